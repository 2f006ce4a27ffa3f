"""From records to alerts, and who is told of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from entropy_monitor.analyzer import Analyzer
from entropy_monitor.guard import Guard
from entropy_monitor.hooks import Harvest
from entropy_monitor.records import Alert, AlertEvent, Record, severity_rank
from entropy_monitor.transfer import fetch


class Alerting:
    """Judges records as they arrive, adds the attention map to what it finds, and calls `on_alert`.

    Args:
        analyzer: finds the alerts.
        guard: keeps its faults, and those of `on_alert`, from the training.
        on_alert: called with each alert that opens or becomes more severe.

    Attributes:
        suspects: layers whose attention maps the next alerts may want, by the last record.
    """

    def __init__(self, analyzer: Analyzer, guard: Guard, on_alert: Callable[[Alert], object] | None) -> None:
        self._analyzer = analyzer
        self._guard = guard
        self._on_alert = on_alert
        self.suspects: frozenset[str] = frozenset()
        self._told: dict[str, int] = {}  # the severity at which an open alert was last told

    @property
    def open_alerts(self) -> tuple[Alert, ...]:
        """The alerts that are open now."""
        return self._analyzer.open_alerts

    def judge(self, record: Record, harvest: Harvest | None) -> list[AlertEvent]:
        """What a record changes.

        Args:
            record: as it goes to the sinks.
            harvest: what it was made from, for attention maps.
        """
        found = self._guard.run("analysing", self._analyzer.update, record) or []
        self._suspect()
        events = []
        for event in found:
            if harvest is not None:
                event = self._guard.run("keeping an attention map", self._with_map, event, harvest) or event
            events.append(event)
        return events

    def tell(self, event: AlertEvent) -> None:
        """Call `on_alert` where an event asks for it; after it was delivered, for it may end the run."""
        self._guard.run("on_alert", self._tell, event)

    def state_dict(self) -> dict[str, Any]:
        """The analyzer's state, JSON-able."""
        return self._analyzer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; alerts that are open then are not told again."""
        self._analyzer.load_state_dict(state)
        self._told = {a.id: severity_rank(a.severity) for a in self.open_alerts}
        self._suspect()

    def _suspect(self) -> None:
        self.suspects = self._guard.run("analysing", lambda: self._analyzer.suspects) or frozenset()

    def _with_map(self, event: AlertEvent, harvest: Harvest) -> AlertEvent:
        """The event with the pooled attention map of its worst head."""
        evidence = event.alert.evidence
        if event.event == "closed" or "worst_head" not in evidence or "map" in evidence:
            return event
        pooled = harvest.map_of(event.alert.layer, evidence.get("call", 0), evidence["worst_head"])
        if pooled is None:
            return event
        picture = fetch(pooled).float()
        rounded = [[round(x, 4) for x in row] for row in picture.tolist()]
        return replace(event, alert=self._analyzer.attach(event.alert.id, map=rounded))

    def _tell(self, event: AlertEvent) -> None:
        if event.event == "closed":
            self._told.pop(event.alert.id, None)
            return
        severity = severity_rank(event.alert.severity)
        if severity > self._told.get(event.alert.id, -1):
            self._told[event.alert.id] = severity
            if self._on_alert is not None:
                self._on_alert(event.alert)
