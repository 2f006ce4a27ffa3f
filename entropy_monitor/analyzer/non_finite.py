"""NaN or infinity in the attention or the loss: severe at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from entropy_monitor.analyzer import advice, wording
from entropy_monitor.analyzer.detector import Finding, Words
from entropy_monitor.analyzer.latch import Latch
from entropy_monitor.analyzer.layer_groups import LayerGroups
from entropy_monitor.analyzer.reading import Reading
from entropy_monitor.analyzer.slots import BoolArray, State
from entropy_monitor.analyzer.thresholds import Thresholds
from entropy_monitor.phrases import number

_RUN = np.ones(1, dtype=np.bool_)  # the one slot of a latch that is about the whole run


class NonFinite:
    """Finds entropies, logits and losses that are not numbers.

    A largest logit of -inf, or no row read, means that everything was masked: that is no fault.
    """

    kind: ClassVar[str] = "non_finite"

    def __init__(self, thresholds: Thresholds) -> None:
        self._heads = Latch(1, thresholds.close_after)
        self._loss = Latch(1, thresholds.close_after)
        self._loss.grow(1)
        self._groups = LayerGroups()

    def update(self, reading: Reading) -> list[Finding]:
        """See `Detector.update`."""
        self._heads.grow(len(reading.index))
        sound = np.isfinite(reading.entropy) & (reading.max_logit != np.inf)  # NaN: not known
        self._heads.update(reading.read, reading.read & ~sound, reading.read & sound, reading.step)
        if reading.loss.bad or reading.loss.given:
            ill = np.array([reading.loss.bad])
            step = reading.loss.bad_since if reading.loss.bad else reading.step
            self._loss.update(_RUN, ill, ~ill, step)
        groups = [] if self._heads.idle else self._groups.of(reading.index, self._heads.on)
        findings = [
            Finding(
                layer=group.layer,
                heads=group.heads,
                of=group.of,
                severity="severe",
                since=group.first_step(self._heads.since),
                score=0.0,
                worst=int(group.slots[0]),
            )
            for group in groups
        ]
        if self._loss.on[0]:
            findings.append(Finding("", (), 0, "severe", int(self._loss.since[0]), 0.0))
        return findings

    def near(self) -> BoolArray:
        """See `Detector.near`."""
        return self._heads.near

    def describe(self, finding: Finding, evidence: Mapping[str, Any]) -> Words:
        """See `Detector.describe`."""
        if not finding.layer:
            return Words(
                title="The loss is not finite",
                message=wording.sentences(
                    f"The loss is NaN or infinite since step {finding.since}",
                    f"The last finite value was {number(evidence['loss'])}" if "loss" in evidence else "",
                ),
                advice=advice.non_finite(finding.since, evidence),
            )
        where = wording.where(finding)
        return Words(
            title=f"Attention is not finite in {where}",
            message=wording.sentences(
                f"In {where} attention entropy or logits are NaN or infinite since step {finding.since}",
                "Where several layers report this, the first in order of execution is the one to look at",
            ),
            advice=advice.non_finite(finding.since, evidence),
        )

    def state_dict(self) -> State:
        """See `Detector.state_dict`."""
        return {"heads": self._heads.state_dict(), "loss": self._loss.state_dict()}

    def load_state_dict(self, state: State) -> None:
        """See `Detector.load_state_dict`."""
        self._heads.load_state_dict(state["heads"])
        self._loss.load_state_dict(state["loss"])
