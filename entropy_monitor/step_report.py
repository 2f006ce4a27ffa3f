"""What a training loop gets back from `EntropyMonitor.step`."""

from __future__ import annotations

from dataclasses import dataclass

from entropy_monitor.records import Alert, AlertEvent


@dataclass(frozen=True)
class StepReport:
    """What one `step()` brought.

    Attributes:
        step: the training step that ended.
        measured: whether its forward was measured.
        events: alerts that opened, changed or closed. On an accelerator they may come one `step()` late;
            each says at which step it was measured.
    """

    step: int
    measured: bool
    events: tuple[AlertEvent, ...] = ()

    @property
    def alerts(self) -> tuple[Alert, ...]:
        """The alerts that opened."""
        return tuple(e.alert for e in self.events if e.event == "opened")
