"""Entropy collapse: heads of a layer that fell to near one-hot attention (Zhai et al. 2023, section 1).

Low entropy alone is no illness: previous-token heads are born sharp, and sound runs end with sharp
late layers. What is ill is a *fall*: low, far below the head's own recent high, in most of a layer
at once. Two more signs are taken: a fall that is only half-way but comes with large logits and a
loss that does not improve, which is early; and a single head whose logits have exploded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from entropy_monitor.analyzer import advice, wording
from entropy_monitor.analyzer.detector import Finding, Words, first_step, heads_of, slots_on
from entropy_monitor.analyzer.latch import Latch
from entropy_monitor.analyzer.reading import Reading
from entropy_monitor.analyzer.slots import BoolArray, FloatArray, IntArray, SlotArrays, State
from entropy_monitor.analyzer.thresholds import Thresholds

_LEAST_SHARE = 1e-3  # below this, lower is no news: an open alert is not told again for it


class EntropyCollapse:
    """Watches each head's share of its maximal entropy against its own past."""

    kind: ClassVar[str] = "entropy_collapse"

    def __init__(self, thresholds: Thresholds) -> None:
        self._limits = thresholds
        # share: the latest; recent: the recent high, forgotten slowly; peak: the high of all time
        self._heads = SlotArrays(share=math.nan, recent=math.nan, peak=math.nan, exploded=0.0)
        self._low = Latch(thresholds.open_after, thresholds.close_after)
        self._layers = Latch(1, 1)

    def update(self, reading: Reading) -> list[Finding]:
        """See `Detector.update`."""
        for state in (self._heads, self._low):
            state.grow(len(reading.index))
        self._layers.grow(len(reading.index.layers))
        judged = ~np.isnan(reading.share)
        at, share, logit = reading.slots[judged], reading.share[judged], reading.max_logit[judged]
        self._remember(at, share)
        self._heads["exploded"][at] = logit >= self._limits.logit_level
        enter = self._fallen(at, share, logit, stalled=reading.loss.stalled(self._limits.stalled_loss))
        self._low.update(at, enter, share > self._limits.collapse_release_share, reading.step)
        self._switch_layers(reading, at)
        low = self._low.on
        return [self._finding(reading, int(layer), low) for layer in np.flatnonzero(self._layers.on)]

    def describe(self, finding: Finding, evidence: Mapping[str, Any]) -> Words:
        """See `Detector.describe`."""
        verb = "has collapsed" if finding.severity == "severe" else "is collapsing"
        deep = evidence.get("entropy_share", 1.0) <= self._limits.collapse_bottom
        where = wording.where(finding)
        return Words(
            title=f"Attention entropy {verb} in {where}",
            message=wording.sentences(
                f"In {where} {wording.entropy_fall(evidence)}; the first sign was at step {finding.since}",
                wording.drivers(evidence),
                wording.loss_course(evidence, self._limits.stalled_loss, may_be_sound=not deep),
            ),
            advice=advice.collapse(finding.since, evidence),
        )

    def state_dict(self) -> State:
        """See `Detector.state_dict`."""
        return {
            "heads": self._heads.state_dict(),
            "low": self._low.state_dict(),
            "layers": self._layers.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """See `Detector.load_state_dict`."""
        self._heads.load_state_dict(state["heads"])
        self._low.load_state_dict(state["low"])
        self._layers.load_state_dict(state["layers"])

    def _remember(self, at: IntArray, share: FloatArray) -> None:
        heads = self._heads
        heads["share"][at] = share
        heads["peak"][at] = np.fmax(heads["peak"][at], share)
        recent = heads["recent"][at]
        forgotten = recent + (share - recent) / self._limits.collapse_memory
        heads["recent"][at] = np.fmax(share, forgotten)

    def _fallen(self, at: IntArray, share: FloatArray, logit: FloatArray, *, stalled: bool) -> BoolArray:
        limits = self._limits
        fast = share * limits.collapse_drop <= self._heads["recent"][at]
        low = share <= limits.collapse_share
        was_high = self._heads["peak"][at] >= limits.collapse_share * limits.collapse_drop
        bottom = (share <= limits.collapse_bottom) & was_high
        early = (share <= limits.collapse_early_share) & (logit >= limits.collapse_early_logit)
        fallen: BoolArray = (fast & was_high & (low | (early & stalled))) | bottom
        return fallen

    def _switch_layers(self, reading: Reading, at: IntArray) -> None:
        """A layer goes on with most of its judged heads, or with one that has exploded; off with the last."""
        index, layers = reading.index, len(reading.index.layers)
        judged = ~np.isnan(self._heads["share"])
        low = self._low.on
        of = np.bincount(index.layer[judged], minlength=layers)
        fraction = np.bincount(index.layer[low], minlength=layers) / np.maximum(of, 1)
        very_low = low & (self._heads["share"] <= self._limits.collapse_share)
        exploded = index.layer[very_low & (self._heads["exploded"] > 0)]
        credible = np.bincount(exploded, minlength=layers) > 0
        most = fraction >= max(self._limits.collapse_layer_fraction, 1e-9)
        seen = np.unique(index.layer[at])
        self._layers.update(seen, (most | credible)[seen], (fraction == 0)[seen], reading.step)

    def _finding(self, reading: Reading, layer: int, low: BoolArray) -> Finding:
        index, share = reading.index, self._heads["share"]
        slots = slots_on(index, low, layer)
        worst = int(slots[np.argmin(share[slots])])
        complete = np.count_nonzero(share[slots] <= self._limits.collapse_share)
        judged = np.count_nonzero(~np.isnan(share[index.slots_of[layer]]))
        severe = complete >= self._limits.collapse_layer_fraction * judged
        return Finding(
            layer=index.layers[layer],
            heads=heads_of(index, slots),
            of=index.heads_in[layer],
            severity="severe" if severe else "warning",
            since=first_step(self._low.since, slots),
            score=-math.log2(max(float(share[worst]), _LEAST_SHARE)),
            worst=worst,
        )
