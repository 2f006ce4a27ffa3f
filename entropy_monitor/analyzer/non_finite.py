"""NaN or infinity in the attention or the loss: severe at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from entropy_monitor.analyzer import advice, wording
from entropy_monitor.analyzer.detector import (
    Finding,
    Words,
    first_step,
    group_by_layer,
    heads_of,
)
from entropy_monitor.analyzer.latch import Latch
from entropy_monitor.analyzer.reading import Reading
from entropy_monitor.analyzer.slots import State
from entropy_monitor.analyzer.thresholds import Thresholds
from entropy_monitor.phrases import number

_RUN = np.zeros(1, dtype=np.int64)


class NonFinite:
    """Finds entropies, logits and losses that are not numbers.

    A largest logit of -inf, or no row read, means that everything was masked: that is no fault.
    """

    kind: ClassVar[str] = "non_finite"

    def __init__(self, thresholds: Thresholds) -> None:
        self._heads = Latch(1, thresholds.close_after)
        self._loss = Latch(1, thresholds.close_after)
        self._loss.grow(1)

    def update(self, reading: Reading) -> list[Finding]:
        """See `Detector.update`."""
        self._heads.grow(len(reading.index))
        entropy = ~np.isfinite(reading.entropy)
        logit = np.isnan(reading.max_logit) | (reading.max_logit == np.inf)
        bad = (entropy | logit)[reading.read]
        self._heads.update(reading.slots[reading.read], bad, ~bad, reading.step)
        if reading.loss.bad or reading.loss.given:
            ill = np.array([reading.loss.bad])
            step = reading.loss.bad_since if reading.loss.bad else reading.step
            self._loss.update(_RUN, ill, ~ill, step)
        findings = [
            Finding(
                layer=reading.index.layers[layer],
                heads=heads_of(reading.index, slots),
                of=reading.index.heads_in[layer],
                severity="severe",
                since=first_step(self._heads.since, slots),
                score=0.0,
                worst=int(slots[0]),
            )
            for layer, slots in group_by_layer(reading.index, self._heads.on)
        ]
        if self._loss.on[0]:
            findings.append(Finding("", (), 0, "severe", int(self._loss.since[0]), 0.0))
        return findings

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
