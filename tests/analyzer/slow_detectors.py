"""The rules about heads, one head after the other in plain Python: the oracle of the detectors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from entropy_monitor.analyzer.loss import LossTrack
from entropy_monitor.analyzer.thresholds import Thresholds
from entropy_monitor.records import Record
from tests.analyzer.test_latch import SlowLatch

Key = tuple[str, int, int]
Found = tuple[str, tuple[int, ...], str, int, Key]
"""Layer, heads, severity, first step, worst head."""


@dataclass
class SlowHead:
    """What is remembered of one head."""

    latch: SlowLatch
    figures: dict[str, float] = field(default_factory=dict)


class SlowDetector:
    """One rule. `judge` gives whether a row looks ill and whether it looks well, None to pass over it."""

    def __init__(self, limits: Thresholds, on_after: int) -> None:
        self.limits = limits
        self.heads: dict[Key, SlowHead] = {}
        self._on_after = on_after

    def update(self, record: Record, loss: LossTrack) -> list[Found]:
        for row in rows(record):
            key = (row["layer"], row["call"], row["head"])
            head = self.heads.setdefault(key, SlowHead(SlowLatch(self._on_after, self.limits.close_after)))
            verdict = self.judge(head.figures, row, loss)
            if verdict is not None:
                head.latch.update(*verdict, record.step)
        layers = dict.fromkeys(layer for layer, _, _ in self.heads)
        return [self.find(layer, ill) for layer in layers if (ill := self.ill(layer)) and self.shown(layer)]

    def of(self, layer: str) -> dict[Key, SlowHead]:
        return {key: head for key, head in self.heads.items() if key[0] == layer}

    def ill(self, layer: str) -> dict[Key, SlowHead]:
        return {key: head for key, head in self.of(layer).items() if head.latch.on}

    def find(self, layer: str, ill: dict[Key, SlowHead]) -> Found:
        since = min(head.latch.since for head in ill.values() if head.latch.since is not None)
        heads = tuple(sorted({head for _, _, head in ill}))
        return layer, heads, self.severity(layer, ill), since, self.worst(ill)

    def shown(self, layer: str) -> bool:
        return True

    def judge(self, figures: dict[str, float], row: Any, loss: LossTrack) -> tuple[bool, bool] | None:
        raise NotImplementedError

    def severity(self, layer: str, ill: dict[Key, SlowHead]) -> str:
        return "warning"

    def worst(self, ill: dict[Key, SlowHead]) -> Key:
        raise NotImplementedError


class SlowNonFinite(SlowDetector):
    def judge(self, figures: dict[str, float], row: Any, loss: LossTrack) -> tuple[bool, bool] | None:
        if not row["read"]:
            return None
        sound = math.isfinite(row["entropy"]) and row["max_logit"] != math.inf
        return not sound, sound

    def severity(self, layer: str, ill: dict[Key, SlowHead]) -> str:
        return "severe"

    def worst(self, ill: dict[Key, SlowHead]) -> Key:
        return next(iter(ill))


class SlowCaptureFault(SlowDetector):
    def judge(self, figures: dict[str, float], row: Any, loss: LossTrack) -> tuple[bool, bool] | None:
        floors = [row[name] for name in ("floor_row", "floor_activation", "floor_weights")]
        floor = max((x for x in floors if not math.isnan(x)), default=math.nan)
        if not (row["read"] and math.isfinite(floor) and math.isfinite(row["entropy"])):
            return None
        figures["gap"] = floor - row["entropy"]
        most = 0.0 if math.isnan(row["max_entropy"]) else row["max_entropy"]
        wrong = figures["gap"] > self.limits.fault_tolerance * (1.0 + most)
        return wrong, not wrong

    def worst(self, ill: dict[Key, SlowHead]) -> Key:
        return max(ill, key=lambda key: ill[key].figures["gap"])


class SlowLogitExplosion(SlowDetector):
    def judge(self, figures: dict[str, float], row: Any, loss: LossTrack) -> tuple[bool, bool] | None:
        logit, limits = row["max_logit"], self.limits
        if not (row["read"] and math.isfinite(logit)):
            return None
        first, mean = figures.setdefault("first", logit), figures.setdefault("mean", logit)
        figures["mean"] += limits.logit_trend * (logit - mean)
        figures["last"] = logit
        grown = logit >= limits.logit_growth * max(first, limits.logit_least_start)
        ill = logit >= limits.logit_level and grown and logit > mean
        return ill, logit < limits.logit_level * limits.logit_release

    def severity(self, layer: str, ill: dict[Key, SlowHead]) -> str:
        largest = max(head.figures["last"] for head in ill.values())
        return "severe" if largest >= self.limits.logit_severe else "warning"

    def worst(self, ill: dict[Key, SlowHead]) -> Key:
        return max(ill, key=lambda key: ill[key].figures["last"])


class SlowEntropyCollapse(SlowDetector):
    def __init__(self, limits: Thresholds, on_after: int) -> None:
        super().__init__(limits, on_after)
        self._layers: dict[str, SlowLatch] = {}

    def update(self, record: Record, loss: LossTrack) -> list[Found]:
        super().update(record, loss)
        judged = {row["layer"] for row in rows(record) if not math.isnan(self.share(row))}
        for layer in judged:
            low, known = self.ill(layer), self.known(layer)
            fraction = len(low) / max(len(known), 1)
            credible = any(
                head.figures["exploded"] and head.figures["share"] <= self.limits.collapse_share
                for head in low.values()
            )
            most = fraction >= max(self.limits.collapse_layer_fraction, 1e-9)
            latch = self._layers.setdefault(layer, SlowLatch(1, 1))
            latch.update(most or credible, fraction == 0, record.step)
        layers = dict.fromkeys(layer for layer, _, _ in self.heads)
        return [self.find(layer, self.ill(layer)) for layer in layers if self.shown(layer)]

    def shown(self, layer: str) -> bool:
        return layer in self._layers and self._layers[layer].on

    def known(self, layer: str) -> list[SlowHead]:
        return [head for head in self.of(layer).values() if "share" in head.figures]

    def share(self, row: Any) -> float:
        known = row["read"] and math.isfinite(row["entropy"])
        known = known and row["max_entropy"] >= self.limits.min_max_entropy
        return row["entropy"] / row["max_entropy"] if known else math.nan

    def judge(self, figures: dict[str, float], row: Any, loss: LossTrack) -> tuple[bool, bool] | None:
        share, logit, limits = self.share(row), row["max_logit"], self.limits
        if math.isnan(share):
            return None
        figures["share"], figures["exploded"] = share, logit >= limits.logit_level
        figures["peak"] = max(figures.get("peak", share), share)
        recent = figures.get("recent", share)
        figures["recent"] = max(share, recent + (share - recent) / limits.collapse_memory)
        was_high = figures["peak"] >= limits.collapse_share * limits.collapse_drop
        fast = share * limits.collapse_drop <= figures["recent"]
        early = share <= limits.collapse_early_share and logit >= limits.collapse_early_logit
        low = share <= limits.collapse_share or (early and loss.stalled(limits.stalled_loss))
        fallen = was_high and ((fast and low) or share <= limits.collapse_bottom)
        return fallen, share > limits.collapse_release_share

    def severity(self, layer: str, ill: dict[Key, SlowHead]) -> str:
        complete = [head for head in ill.values() if head.figures["share"] <= self.limits.collapse_share]
        most = self.limits.collapse_layer_fraction * len(self.known(layer))
        return "severe" if len(complete) >= most else "warning"

    def worst(self, ill: dict[Key, SlowHead]) -> Key:
        return min(ill, key=lambda key: ill[key].figures["share"])


def rows(record: Record) -> Iterator[dict[str, Any]]:
    """The rows of `heads`, and whether anything was read for each."""
    names = list(record.heads)
    for values in zip(*(list(record.heads[name]) for name in names), strict=True):
        row = {n: x if isinstance(x, str) else x.item() for n, x in zip(names, values, strict=True)}
        yield row | {"read": row["rows_read"] != 0 and row["max_logit"] != -math.inf}
