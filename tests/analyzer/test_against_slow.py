"""The detectors against the same rules head by head, and records that hold the same in another order."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from entropy_monitor.analyzer import Analyzer, Thresholds
from entropy_monitor.analyzer.capture_fault import CaptureFault
from entropy_monitor.analyzer.detector import Detector
from entropy_monitor.analyzer.entropy_collapse import EntropyCollapse
from entropy_monitor.analyzer.logit_explosion import LogitExplosion
from entropy_monitor.analyzer.loss import LossTrack
from entropy_monitor.analyzer.non_finite import NonFinite
from entropy_monitor.analyzer.reading import Reading
from entropy_monitor.analyzer.slots import HeadIndex
from entropy_monitor.records import Columns, Record
from tests.analyzer.series import digits, keys, play, record
from tests.analyzer.slow_detectors import (
    Found,
    SlowCaptureFault,
    SlowDetector,
    SlowEntropyCollapse,
    SlowLogitExplosion,
    SlowNonFinite,
)
from tests.analyzer.test_analyzer import troubled

LIMITS = Thresholds()
PAIRS: list[tuple[type[Detector], type[SlowDetector], int]] = [
    (NonFinite, SlowNonFinite, 1),
    (CaptureFault, SlowCaptureFault, 1),
    (EntropyCollapse, SlowEntropyCollapse, LIMITS.open_after),
    (LogitExplosion, SlowLogitExplosion, LIMITS.open_after),
]


def calm(seed: int) -> list[Record]:
    """Long sound stretches with all heads in order, and trouble in a few of them now and then."""
    rng = np.random.default_rng(seed)
    heads = keys(4, 3)
    made = []
    for i in range(120):
        ill = rng.random(len(heads)) < (0.9 if i // 15 % 3 == 1 else 0.0)
        made.append(
            record(
                5 * i,
                heads,
                share=np.where(ill, 0.03, 0.8),
                max_logit=np.where(ill, 500.0 + 10.0 * i, 3.0),
                floor_row=np.where(ill & (rng.random(len(heads)) < 0.1), 2.7, 0.01),
                rows_read=np.where(ill & (rng.random(len(heads)) < 0.1), 0, 512),
                max_entropy=np.where(rng.random(len(heads)) < 0.02, math.nan, math.log(16)),
                loss=2.0,
            )
        )
    return made


def found(detector: Detector, reading: Reading) -> list[Found]:
    index = reading.index
    return [
        (f.layer, f.heads, f.severity, f.since, (f.layer, int(index.call[f.worst]), int(index.head[f.worst])))
        for f in detector.update(reading)
        if f.worst is not None
    ]


@pytest.mark.parametrize("records", [troubled(0), troubled(1), calm(2), digits("collapse"), digits("hot")])
@pytest.mark.parametrize(("fast", "slow", "on_after"), PAIRS, ids=lambda x: getattr(x, "__name__", ""))
def test_finds_what_the_rules_say_of_each_head(
    records: list[Record], fast: type[Detector], slow: type[SlowDetector], on_after: int
) -> None:
    one, other = fast(LIMITS), slow(LIMITS, on_after)
    index, loss = HeadIndex(), LossTrack(LIMITS.loss_smoothing)
    for each in records:
        loss.update(each)
        reading = Reading.of(each, index, loss, LIMITS.min_max_entropy)
        assert found(one, reading) == other.update(each, loss), f"at step {each.step}"


def test_the_series_show_every_kind_of_trouble() -> None:
    for records in (troubled(0), calm(2)):
        kinds = {event.alert.kind for event in play(Analyzer(), records)}
        assert kinds >= {fast.kind for fast, _, _ in PAIRS}


@pytest.mark.parametrize("records", [troubled(3), calm(4), digits("collapse")])
def test_the_order_of_rows_is_without_effect(records: list[Record]) -> None:
    rng = np.random.default_rng(0)
    shuffled = [records[0], *(shuffle(each, rng) for each in records[1:])]
    expected = play(Analyzer(), records)
    assert expected
    assert play(Analyzer(), shuffled) == expected


def shuffle(each: Record, rng: np.random.Generator) -> Record:
    order = rng.permutation(len(each.heads["head"]))
    heads: Columns = {name: take(values, order) for name, values in each.heads.items()}
    return dataclasses.replace(each, heads=heads)


def take(values: Any, order: Any) -> Any:
    return [values[i] for i in order] if isinstance(values, list) else values[order]
