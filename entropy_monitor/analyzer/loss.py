"""The loss as the detectors use it: where it began, and where it is once noise is smoothed away."""

from __future__ import annotations

import math

import numpy as np

from entropy_monitor.analyzer.slots import State
from entropy_monitor.records import Record


class LossTrack:
    """Follows the scalar named `loss`. Values that are not finite are noted and enter no average.

    Args:
        smoothing: weight of a record's mean loss in `smooth`, see `Thresholds.loss_smoothing`.

    Attributes:
        start: mean loss of the first record that held one, NaN before.
        smooth: exponential mean over records, NaN before the first.
        last: the latest finite value, NaN before the first.
        bad: whether the present record held a loss that was not finite.
        bad_since: the step of the first such loss in the present record.
        given: whether the present record held a finite loss.
    """

    def __init__(self, smoothing: float) -> None:
        self._smoothing = smoothing
        self.start = math.nan
        self.smooth = math.nan
        self.last = math.nan
        self.bad = False
        self.bad_since = 0
        self.given = False

    def update(self, record: Record) -> None:
        """Take in one record's losses."""
        names = record.scalars.get("name", ())
        values = np.asarray(record.scalars.get("value", ()), dtype=np.float64)
        rows = [i for i, name in enumerate(names) if name == "loss"]
        losses = values[rows]
        finite = losses[np.isfinite(losses)]
        self.bad = len(finite) < len(losses)
        if self.bad:
            steps = np.asarray(record.scalars["step"], dtype=np.int64)[rows]
            self.bad_since = int(steps[~np.isfinite(losses)].min())
        self.given = len(finite) > 0
        if not self.given:
            return
        mean = float(finite.mean())
        self.last = float(finite[-1])
        if math.isnan(self.start):
            self.start = self.smooth = mean
        else:
            self.smooth += self._smoothing * (mean - self.smooth)

    def stalled(self, fraction: float) -> bool:
        """Whether a loss is known and has lost less than `fraction` of its first value."""
        return self.start - self.smooth < fraction * abs(self.start)

    def state_dict(self) -> State:
        """The averages, with None for what is not known."""
        return {
            name: None if math.isnan(value) else value
            for name, value in (("start", self.start), ("smooth", self.smooth), ("last", self.last))
        }

    def load_state_dict(self, state: State) -> None:
        """Take over what `state_dict` gave."""
        self.start, self.smooth, self.last = (
            math.nan if state[name] is None else state[name] for name in ("start", "smooth", "last")
        )
