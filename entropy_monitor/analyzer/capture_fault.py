"""Capture fault: an entropy below what a theorem allows, so the figures themselves are wrong.

Theorem 3.1 of Zhai et al. 2023 bounds the entropy of a row from below by the norm of its logits.
The floors are means of that bound over the very rows that the entropy was read from: no sampling
error lies between them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from entropy_monitor.analyzer import wording
from entropy_monitor.analyzer.detector import Finding, Words
from entropy_monitor.analyzer.latch import Latch
from entropy_monitor.analyzer.layer_groups import LayerGroup, LayerGroups
from entropy_monitor.analyzer.reading import Reading
from entropy_monitor.analyzer.slots import BoolArray, SlotArrays, State
from entropy_monitor.analyzer.thresholds import Thresholds
from entropy_monitor.phrases import number

_FLOORS = ("floor_row", "floor_activation", "floor_weights")  # floor_paper is no floor


class CaptureFault:
    """Compares each head's entropy with its true floors."""

    kind: ClassVar[str] = "capture_fault"

    def __init__(self, thresholds: Thresholds) -> None:
        self._limits = thresholds
        self._heads = SlotArrays(gap=math.nan)
        self._wrong = Latch(1, thresholds.close_after)
        self._groups = LayerGroups()

    def update(self, reading: Reading) -> list[Finding]:
        """See `Detector.update`."""
        self._heads.grow(len(reading.index))
        self._wrong.grow(len(reading.index))
        floor = functools.reduce(np.fmax, (reading.column(name) for name in _FLOORS))
        known = reading.read & np.isfinite(floor) & np.isfinite(reading.entropy)
        gap = np.full(len(known), math.nan)
        np.subtract(floor, reading.entropy, out=gap, where=known)
        most = reading.max_entropy
        if not np.isfinite(most).all():
            most = np.nan_to_num(most)
        above = gap > self._limits.fault_tolerance * (1.0 + most)
        np.copyto(self._heads["gap"], gap, where=known)
        self._wrong.update(known, above, known & ~above, reading.step)
        if self._wrong.idle:
            return []
        return [self._finding(group) for group in self._groups.of(reading.index, self._wrong.on)]

    def near(self) -> BoolArray:
        """See `Detector.near`."""
        return self._wrong.near

    def describe(self, finding: Finding, evidence: Mapping[str, Any]) -> Words:
        """See `Detector.describe`."""
        where = wording.where(finding)
        return Words(
            title=f"The figures for {finding.layer} cannot be right",
            message=wording.sentences(
                f"In {where} the measured entropy lies {number(evidence['below_floor'])} "
                "nats below a floor that no softmax attention with these logits can pass (Zhai "
                f"et al. 2023, Theorem 3.1), since step {finding.since}",
                "What is read is not what this layer computes. Its entropies, floors and other "
                "alerts are not to be trusted; training itself is not concerned",
            ),
            advice="Name this layer's attention and its query and key projections by hand, or "
            "leave the layer out, and please report it with the attention's code: this is a "
            "fault of the measurement, not of the run.",
        )

    def state_dict(self) -> State:
        """See `Detector.state_dict`."""
        return {"heads": self._heads.state_dict(), "wrong": self._wrong.state_dict()}

    def load_state_dict(self, state: State) -> None:
        """See `Detector.load_state_dict`."""
        self._heads.load_state_dict(state["heads"])
        self._wrong.load_state_dict(state["wrong"])

    def _finding(self, group: LayerGroup) -> Finding:
        gap = self._heads["gap"][group.slots]
        return Finding(
            layer=group.layer,
            heads=group.heads,
            of=group.of,
            severity="warning",
            since=group.first_step(self._wrong.since),
            score=0.0,
            worst=int(group.slots[gap.argmax()]),
            figures={"below_floor": float(gap.max())},
        )
