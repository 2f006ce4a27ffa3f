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
from entropy_monitor.analyzer.detector import Finding, Words
from entropy_monitor.analyzer.latch import Latch
from entropy_monitor.analyzer.layer_groups import LayerGroup, LayerGroups
from entropy_monitor.analyzer.reading import Reading
from entropy_monitor.analyzer.slots import BoolArray, IntArray, SlotArrays, State
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
        self._groups = LayerGroups()

    def update(self, reading: Reading) -> list[Finding]:
        """See `Detector.update`."""
        for state in (self._heads, self._low):
            state.grow(len(reading.index))
        self._layers.grow(len(reading.index.layers))
        self._remember(reading)
        leave = reading.share > self._limits.collapse_release_share
        self._low.update(reading.judged, self._fallen(reading), leave, reading.step)
        if self._low.idle and self._layers.idle:
            return []
        index, low = reading.index, self._low.on
        judged = np.bincount(index.layer[~np.isnan(self._heads["share"])], minlength=len(index.layers))
        self._switch_layers(reading, low, judged)
        on = self._layers.on
        groups = (group for group in self._groups.of(index, low) if on[group.number])
        return [self._finding(group, int(judged[group.number])) for group in groups]

    def near(self) -> BoolArray:
        """See `Detector.near`."""
        return self._low.near

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

    def _remember(self, reading: Reading) -> None:
        heads, share, judged = self._heads, reading.share, reading.judged
        np.copyto(heads["share"], share, where=judged)
        np.copyto(heads["exploded"], reading.max_logit >= self._limits.logit_level, where=judged)
        peak, recent = heads["peak"], heads["recent"]
        np.fmax(peak, share, out=peak)
        forgotten = recent + (share - recent) / self._limits.collapse_memory
        np.copyto(recent, np.fmax(share, forgotten), where=judged)

    def _fallen(self, reading: Reading) -> BoolArray:
        limits, share = self._limits, reading.share
        low: BoolArray = share <= limits.collapse_early_share  # the mildest of all limits
        if not low.any():
            return low
        fast = share * limits.collapse_drop <= self._heads["recent"]
        was_high = self._heads["peak"] >= limits.collapse_share * limits.collapse_drop
        early = low & (reading.max_logit >= limits.collapse_early_logit)
        low = share <= limits.collapse_share
        if reading.loss.stalled(limits.stalled_loss):
            low |= early
        fallen: BoolArray = was_high & ((fast & low) | (share <= limits.collapse_bottom))
        return fallen

    def _switch_layers(self, reading: Reading, low: BoolArray, judged: IntArray) -> None:
        """A layer goes on with most of its judged heads, or with one that has exploded; off with the last."""
        index, layers = reading.index, len(reading.index.layers)
        fraction = np.bincount(index.layer[low], minlength=layers) / np.maximum(judged, 1)
        very_low = low & (self._heads["share"] <= self._limits.collapse_share)
        exploded = index.layer[very_low & (self._heads["exploded"] > 0)]
        credible = np.bincount(exploded, minlength=layers) > 0
        most = fraction >= max(self._limits.collapse_layer_fraction, 1e-9)
        seen = np.bincount(index.layer[reading.judged], minlength=layers) > 0
        self._layers.update(seen, seen & (most | credible), seen & (fraction == 0), reading.step)

    def _finding(self, group: LayerGroup, judged: int) -> Finding:
        share = self._heads["share"][group.slots]
        worst = int(share.argmin())
        complete = np.count_nonzero(share <= self._limits.collapse_share)
        severe = complete >= self._limits.collapse_layer_fraction * judged
        return Finding(
            layer=group.layer,
            heads=group.heads,
            of=group.of,
            severity="severe" if severe else "warning",
            since=group.first_step(self._low.since),
            score=-math.log2(max(float(share[worst]), _LEAST_SHARE)),
            worst=int(group.slots[worst]),
        )
