"""Logit explosion: attention logits that have outgrown both their own start and what softmax can resolve."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from entropy_monitor.analyzer import advice, wording
from entropy_monitor.analyzer.detector import Finding, Words
from entropy_monitor.analyzer.latch import Latch
from entropy_monitor.analyzer.layer_groups import LayerGroup, LayerGroups
from entropy_monitor.analyzer.reading import Reading
from entropy_monitor.analyzer.slots import BoolArray, SlotArrays, State
from entropy_monitor.analyzer.thresholds import Thresholds
from entropy_monitor.phrases import number


class LogitExplosion:
    """Watches each head's largest logit against a level and against its own first value.

    To open, a head must be past the level, have grown and be still above its running mean; it
    closes below a fraction of the level. Heads that begin with large logits are never taken: their growth
    is small.
    """

    kind: ClassVar[str] = "logit_explosion"

    def __init__(self, thresholds: Thresholds) -> None:
        self._limits = thresholds
        self._heads = SlotArrays(first=math.nan, mean=math.nan, last=math.nan)
        self._high = Latch(thresholds.open_after, thresholds.close_after)
        self._groups = LayerGroups()

    def update(self, reading: Reading) -> list[Finding]:
        """See `Detector.update`."""
        self._heads.grow(len(reading.index))
        self._high.grow(len(reading.index))
        finite, logit = reading.read & np.isfinite(reading.max_logit), reading.max_logit
        limits = self._limits
        first, mean, last = (self._heads[name] for name in ("first", "mean", "last"))
        new = np.isnan(first) & finite
        if new.any():
            first[new] = mean[new] = logit[new]
        enter = finite & (logit >= limits.logit_level)
        if enter.any():
            enter &= logit >= limits.logit_growth * np.maximum(first, limits.logit_least_start)
            enter &= logit > mean
        mean += limits.logit_trend * (np.where(finite, logit, mean) - mean)
        np.copyto(last, logit, where=finite)
        leave = finite & (logit < limits.logit_level * limits.logit_release)
        self._high.update(finite, enter, leave, reading.step)
        if self._high.idle:
            return []
        return [self._finding(group) for group in self._groups.of(reading.index, self._high.on)]

    def near(self) -> BoolArray:
        """See `Detector.near`."""
        return self._high.near

    def describe(self, finding: Finding, evidence: Mapping[str, Any]) -> Words:
        """See `Detector.describe`."""
        where = wording.where(finding)
        largest = evidence["max_logit_layer"]
        logit, step = number(largest), wording.bfloat16_step(largest)
        return Words(
            title=f"Attention logits have exploded in {where}: the largest is {logit}",
            message=wording.sentences(
                f"In {where} the largest attention logit has reached {logit}; the first sign was "
                f"at step {finding.since}",
                "Softmax is then close to picking a single key, and bfloat16 tells no two such "
                f"logits apart that differ by less than {number(step)}",
                wording.drivers(evidence),
                wording.entropy_state(evidence),
                wording.loss_course(evidence, self._limits.stalled_loss, may_be_sound=False),
            ),
            advice=advice.logits(finding.since, evidence),
        )

    def state_dict(self) -> State:
        """See `Detector.state_dict`."""
        return {"heads": self._heads.state_dict(), "high": self._high.state_dict()}

    def load_state_dict(self, state: State) -> None:
        """See `Detector.load_state_dict`."""
        self._heads.load_state_dict(state["heads"])
        self._high.load_state_dict(state["high"])

    def _finding(self, group: LayerGroup) -> Finding:
        logit = self._heads["last"][group.slots]
        largest = float(logit.max())
        return Finding(
            layer=group.layer,
            heads=group.heads,
            of=group.of,
            severity="severe" if largest >= self._limits.logit_severe else "warning",
            since=group.first_step(self._high.since),
            score=math.log2(max(largest, 1.0)) / 2,  # doublings would be told too often
            worst=int(group.slots[logit.argmax()]),
            figures={"max_logit_layer": largest},
        )
