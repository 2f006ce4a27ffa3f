"""What is sent through W&B's alerts, and when: one message for what comes at once, and not too many."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.records import Alert, Severity, severity_rank

LEVELS: dict[Severity, str] = {"info": "INFO", "warning": "WARN", "severe": "ERROR"}
TITLE_LENGTH = 63
"""W&B refuses longer titles of alerts."""

MOST_TITLES = 30
"""Most alerts that a message lists; of more, the worst."""


@dataclass(frozen=True)
class Message:
    """What `wandb.Run.alert` takes."""

    title: str
    text: str
    level: str


class AlertMail:
    """Gathers alerts into messages that are at least `wait` seconds apart.

    What is new goes out with the next call of `due`, in one message however many alerts opened together;
    what comes within the wait is gathered and goes out after it.

    Args:
        wait: seconds between two messages; 0: none.
        clock: seconds, rising.

    Raises:
        ConfigurationError: `wait` is no number of seconds.
    """

    def __init__(self, wait: float, clock: Callable[[], float] = time.monotonic) -> None:
        if isinstance(wait, bool) or not isinstance(wait, (int, float)) or not 0 <= wait < math.inf:
            raise ConfigurationError(f"alert_wait is {wait!r}; give a number of seconds, 0 for no wait")
        self._wait = wait
        self._clock = clock
        self._sent: float | None = None
        self._waiting: dict[tuple[str, int], Alert] = {}

    def add(self, alert: Alert) -> None:
        """Has an alert told; one that waits already is told in its latest state."""
        self._waiting[alert.id, alert.opened] = alert

    def due(self) -> Message | None:
        """The message to send now, if any."""
        if self._sent is not None and self._clock() - self._sent < self._wait:
            return None
        return self.rest()

    def rest(self) -> Message | None:
        """A message of all that waits, whatever the wait; None where nothing does."""
        if not self._waiting:
            return None
        alerts, self._waiting = list(self._waiting.values()), {}
        self._sent = self._clock()
        return message(alerts)


def message(alerts: Sequence[Alert]) -> Message:
    """One or more alerts as a message, under the title of the worst."""
    ranked = sorted(alerts, key=lambda alert: (-severity_rank(alert.severity), alert.opened))
    worst = ranked[0]
    count = f"{len(ranked)} alerts: " if len(ranked) > 1 else ""
    title = shortened(f"[{worst.severity}] {count}{' '.join(worst.title.split())}")
    text = f"{worst.message}\n\nWhat to do: {worst.advice}"
    if count:
        lines = [f"[{a.severity}] {a.title} (since step {a.opened})" for a in ranked[:MOST_TITLES]]
        hidden = len(ranked) - len(lines)
        lines += [f"and {hidden} more"] if hidden else []
        text = "\n".join([*lines, "", "The worst of them:", text])
    return Message(title, text, LEVELS.get(worst.severity, "WARN"))


def shortened(title: str) -> str:
    """A title as long as W&B takes, shortened in the middle: its ends say what, where."""
    if len(title) <= TITLE_LENGTH:
        return title
    half = (TITLE_LENGTH - 1) // 2
    return f"{title[:half]}…{title[-half:]}"
