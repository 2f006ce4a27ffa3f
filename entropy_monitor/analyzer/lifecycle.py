"""The life of an alert: one for each event, told when it opens, when it really changes, and when it ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from entropy_monitor.analyzer.detector import Finding, Words
from entropy_monitor.analyzer.slots import State
from entropy_monitor.errors import ConfigurationError
from entropy_monitor.records import Alert, AlertEvent, severity_rank

_NEWS = 1.0  # the rise of a score, in doublings, that an open alert is told again for
_CARRIED = "opened_share"  # the figure of the opening that later evidence keeps

Gather = Callable[[Finding], dict[str, Any]]
Describe = Callable[[Finding, Mapping[str, Any]], Words]


@dataclass
class _Open:
    """An open alert, with what decides whether it has changed."""

    alert: Alert
    score: float
    attached: tuple[str, ...] = ()


class AlertBook:
    """Turns the findings of each record into events, one open alert a kind and layer.

    An alert is updated when heads join, when it gets more severe, or when its score has risen by a
    doubling. While it is open its heads only grow and its severity only rises. It closes once its
    finding is gone.
    """

    def __init__(self) -> None:
        self._open: dict[tuple[str, str], _Open] = {}
        self._counts: dict[str, int] = {}

    @property
    def open_alerts(self) -> tuple[Alert, ...]:
        """The alerts that are open, oldest first."""
        return tuple(entry.alert for entry in self._open.values())

    def update(
        self, kind: str, findings: list[Finding], step: int, gather: Gather, describe: Describe
    ) -> list[AlertEvent]:
        """Compare one detector's findings with its open alerts.

        Args:
            kind: the detector's kind.
            findings: all that it finds now.
            step: the record's step.
            gather: gives a finding's evidence; called on events only.
            describe: puts a finding into words; called on events only.
        """
        events = []
        present = set()
        for finding in findings:
            key = (kind, finding.layer)
            present.add(key)
            entry = self._open.get(key)
            if entry is None:
                alert = self._opened(kind, finding, step, gather, describe)
                self._open[key] = _Open(alert, finding.score)
                events.append(AlertEvent("opened", step, alert))
            elif _changed(entry, finding):
                _grow(entry, finding, step, gather, describe)
                events.append(AlertEvent("updated", step, entry.alert))
        gone = [key for key in self._open if key[0] == kind and key not in present]
        return events + [AlertEvent("closed", step, _closed(self._open.pop(key).alert, step)) for key in gone]

    def attach(self, alert_id: str, extra: Mapping[str, Any]) -> Alert:
        """Store more evidence with an open alert.

        It stays for later events while the same head is the worst one.

        Raises:
            ConfigurationError: no such alert is open.
        """
        for entry in self._open.values():
            if entry.alert.id == alert_id:
                plain = {name: _plain(value) for name, value in extra.items()}
                entry.alert = replace(entry.alert, evidence={**entry.alert.evidence, **plain})
                entry.attached = tuple(sorted({*entry.attached, *plain}))
                return entry.alert
        is_open = ", ".join(alert.id for alert in self.open_alerts) or "none"
        raise ConfigurationError(f"no alert {alert_id!r} is open; open: {is_open}")

    def state_dict(self) -> State:
        """The open alerts and the numbers given so far."""
        return {
            "counts": dict(self._counts),
            "open": [
                {
                    "alert": {**dataclasses.asdict(entry.alert), "heads": list(entry.alert.heads)},
                    "score": entry.score,
                    "attached": list(entry.attached),
                }
                for entry in self._open.values()
            ],
        }

    def load_state_dict(self, state: State) -> None:
        """Take over what `state_dict` gave."""
        self._counts = dict(state["counts"])
        self._open = {}
        for kept in state["open"]:
            alert = Alert(**{**kept["alert"], "heads": tuple(kept["alert"]["heads"])})
            entry = _Open(alert, kept["score"], tuple(kept["attached"]))
            self._open[alert.kind, alert.layer] = entry

    def _opened(self, kind: str, finding: Finding, step: int, gather: Gather, describe: Describe) -> Alert:
        self._counts[kind] = self._counts.get(kind, 0) + 1
        evidence = gather(finding)
        if "entropy_share" in evidence:
            evidence[_CARRIED] = evidence["entropy_share"]
        words = describe(finding, evidence)
        return Alert(
            id=f"{kind}-{self._counts[kind]:04d}",
            kind=kind,
            severity=finding.severity,
            layer=finding.layer,
            heads=finding.heads,
            opened=finding.since,
            updated=step,
            closed=None,
            title=words.title,
            message=words.message,
            advice=words.advice,
            evidence=evidence,
        )


def _changed(entry: _Open, finding: Finding) -> bool:
    return (
        (finding.heads != entry.alert.heads and not set(finding.heads) <= set(entry.alert.heads))
        or severity_rank(finding.severity) > severity_rank(entry.alert.severity)
        or finding.score >= entry.score + _NEWS
    )


def _grow(entry: _Open, finding: Finding, step: int, gather: Gather, describe: Describe) -> None:
    old = entry.alert
    finding = replace(
        finding,
        heads=tuple(sorted({*old.heads, *finding.heads})),
        severity=max(old.severity, finding.severity, key=severity_rank),
        since=old.opened,
    )
    evidence = gather(finding)
    if _CARRIED in old.evidence:
        evidence[_CARRIED] = old.evidence[_CARRIED]
    same_head = all(evidence.get(name) == old.evidence.get(name) for name in ("worst_head", "call"))
    if same_head:
        evidence |= {name: old.evidence[name] for name in entry.attached}
    else:
        entry.attached = ()
    words = describe(finding, evidence)
    entry.score = max(entry.score, finding.score)
    entry.alert = replace(
        old,
        severity=finding.severity,
        heads=finding.heads,
        updated=step,
        title=words.title,
        message=words.message,
        advice=words.advice,
        evidence=evidence,
    )


def _closed(alert: Alert, step: int) -> Alert:
    return replace(
        alert,
        updated=step,
        closed=step,
        title=f"Over: {alert.title}",
        message=f"Over at step {step}, after {step - alert.opened} steps. As last told: {alert.message}",
    )


def _plain(value: Any) -> Any:
    """Arrays as lists: evidence is kept as JSON."""
    return value.tolist() if hasattr(value, "tolist") else value
