"""The alerts of a run so far, for a logger: how many are open, and which just got worse."""

from __future__ import annotations

from collections.abc import Iterable

from entropy_monitor.errors import RunDirectoryError
from entropy_monitor.records import Alert, AlertEvent, RunInfo, severity_rank
from entropy_monitor.store import FollowedRun


class AlertBook:
    """Keeps the latest state of each alert, in order of opening."""

    def __init__(self) -> None:
        self._alerts: dict[tuple[str, int], Alert] = {}

    def update(self, event: AlertEvent) -> bool:
        """Takes an event in; True if a person should be told: it is new, or its severity rose."""
        alert = event.alert
        # A process that starts again may count ids from the beginning.
        identity = alert.id, alert.opened
        before = self._alerts.get(identity)
        self._alerts[identity] = alert
        if event.event == "closed" or alert.closed is not None:
            return False
        return before is None or severity_rank(alert.severity) > severity_rank(before.severity)

    def restore(self, events: Iterable[AlertEvent], before: int) -> None:
        """Takes in what earlier processes of the run found before the step that it is continued at."""
        for event in events:
            if event.step < before:
                self.update(event)

    @property
    def alerts(self) -> list[Alert]:
        """Every alert, in its latest state, the first opened first."""
        return sorted(self._alerts.values(), key=lambda alert: alert.opened)

    @property
    def open(self) -> int:
        """How many alerts are open."""
        return sum(alert.closed is None for alert in self._alerts.values())


def earlier_events(info: RunInfo) -> list[AlertEvent]:
    """What earlier processes of a run left in its directory; nothing where it is new or cannot be read."""
    if info.session == 0 or info.run_dir is None:
        return []
    try:
        return list(FollowedRun(info.run_dir).events)
    except (RunDirectoryError, OSError):
        return []
