"""Uniform attention: a run that has not learnt to look anywhere, and does not begin to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from entropy_monitor.analyzer import advice, wording
from entropy_monitor.analyzer.detector import Finding, Words
from entropy_monitor.analyzer.latch import Latch
from entropy_monitor.analyzer.reading import Reading
from entropy_monitor.analyzer.slots import BoolArray, SlotArrays, State
from entropy_monitor.analyzer.thresholds import Thresholds
from entropy_monitor.phrases import number, percent

_RUN = np.ones(1, dtype=np.bool_)  # the one slot of a latch that is about the whole run


class UniformAttention:
    """Counts the records in which most layers attend uniformly while the loss stands still.

    All attention begins uniform, so both must last. Without a loss this detector has no way to tell
    a late learner from a stuck run, and says nothing.
    """

    kind: ClassVar[str] = "uniform_attention"

    def __init__(self, thresholds: Thresholds) -> None:
        self._limits = thresholds
        self._heads = SlotArrays(share=math.nan)
        self._stuck = Latch(thresholds.uniform_records, thresholds.close_after)
        self._stuck.grow(1)
        self._best = math.nan  # the smoothed loss when it last moved
        self._open = False
        self._fraction = 0.0

    def update(self, reading: Reading) -> list[Finding]:
        """See `Detector.update`."""
        self._heads.grow(len(reading.index))
        np.copyto(self._heads["share"], reading.share, where=reading.judged)
        if reading.loss.given and reading.judged.any():
            moved = self._loss_moved(reading.loss.smooth)
            self._fraction = self._uniform_fraction(reading)
            uniform = self._fraction >= self._limits.uniform_layer_fraction
            # A loss that came down and then stands still has learnt what uniform attention can learn.
            stuck = uniform and not moved and reading.loss.stalled(self._limits.uniform_stalled_loss)
            self._stuck.update(_RUN, np.array([stuck]), np.array([not stuck]), reading.step)
        if not self._stuck.on[0]:
            self._open = False
            return []
        since = int(self._stuck.since[0])
        self._open |= reading.step - since >= self._limits.uniform_steps
        return [self._finding(reading, since)] if self._open else []

    def near(self) -> BoolArray:
        """See `Detector.near`."""
        return np.zeros(0, dtype=np.bool_)  # it is about all heads

    def describe(self, finding: Finding, evidence: Mapping[str, Any]) -> Words:
        """See `Detector.describe`."""
        layers = f"{evidence['uniform_layers']:.0f} of {evidence['layers']:.0f} layers"
        return Words(
            title=f"Attention is stuck at uniform in {layers}, and the loss stands still",
            message=wording.sentences(
                f"In {layers} every head has attended to all keys alike since step "
                f"{finding.since} (entropy at least "
                f"{percent(self._limits.uniform_share)} of its maximum)",
                f"Over the same steps the loss has stayed near {number(evidence['loss'])}"
                if "loss" in evidence
                else "",
                "The layers average their values and learn nothing from position or content. "
                "Some sound runs begin like this and find their way later; the longer it lasts, "
                "the less likely",
            ),
            advice=advice.uniform(),
        )

    def state_dict(self) -> State:
        """See `Detector.state_dict`."""
        return {
            "heads": self._heads.state_dict(),
            "stuck": self._stuck.state_dict(),
            "best": None if math.isnan(self._best) else self._best,
            "open": self._open,
            "fraction": self._fraction,
        }

    def load_state_dict(self, state: State) -> None:
        """See `Detector.load_state_dict`."""
        self._heads.load_state_dict(state["heads"])
        self._stuck.load_state_dict(state["stuck"])
        self._best = math.nan if state["best"] is None else state["best"]
        self._open = state["open"]
        self._fraction = state["fraction"]

    def _loss_moved(self, loss: float) -> bool:
        moved = not self._best - loss < self._limits.uniform_loss_gain * abs(self._best)
        if moved:
            self._best = loss
        return moved

    def _uniform_fraction(self, reading: Reading) -> float:
        """The fraction of layers whose every head is uniform."""
        share, layer = self._heads["share"], reading.index.layer
        flat = share >= self._limits.uniform_share
        if not flat.any():
            return 0.0
        heads = np.bincount(layer[~np.isnan(share)])
        uniform = np.bincount(layer[flat], minlength=len(heads))
        return float(np.mean(uniform[heads > 0] == heads[heads > 0]))

    def _finding(self, reading: Reading, since: int) -> Finding:
        layers = len(np.unique(reading.index.layer[~np.isnan(self._heads["share"])]))
        return Finding(
            layer="",
            heads=(),
            of=0,
            severity="warning",
            since=since,
            score=0.0,
            figures={"layers": layers, "uniform_layers": round(self._fraction * layers)},
        )
