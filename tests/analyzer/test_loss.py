from __future__ import annotations

import math
from typing import Any

import pytest

from entropy_monitor.analyzer.loss import LossTrack
from entropy_monitor.records import Record
from tests.analyzer.series import record


def test_only_finite_values_named_loss_count() -> None:
    track = LossTrack(0.3)
    track.update(record(0, [], loss=[2.0, 4.0, math.nan]))
    assert (track.start, track.smooth, track.last) == (3.0, 3.0, 4.0)
    assert track.bad
    assert track.given
    other: Any = {"step": [1], "name": ["accuracy"], "value": [0.1]}
    track.update(Record(1, {}, {}, other))
    assert not track.bad
    assert not track.given
    assert track.last == 4.0


def test_smooth_follows_the_means_of_records() -> None:
    track = LossTrack(0.3)
    track.update(record(0, [], loss=2.0))
    track.update(record(1, [], loss=[0.5, 1.5]))
    assert track.smooth == pytest.approx(2.0 + 0.3 * (1.0 - 2.0))


def test_the_smoothing_is_the_callers() -> None:
    track = LossTrack(1.0)
    track.update(record(0, [], loss=2.0))
    track.update(record(1, [], loss=0.5))
    assert track.smooth == 0.5


@pytest.mark.parametrize(
    ("first", "later", "stalled"),
    [(2.0, 2.0, True), (2.0, 1.95, True), (2.0, 1.0, False), (-1.0, -2.0, False), (-1.0, -0.9, True)],
)
def test_stalled_compares_with_the_start(first: float, later: float, stalled: bool) -> None:
    track = LossTrack(0.3)
    track.update(record(0, [], loss=first))
    for step in range(1, 30):
        track.update(record(step, [], loss=later))
    assert track.stalled(0.05) is stalled


def test_without_a_loss_nothing_is_stalled() -> None:
    track = LossTrack(0.3)
    assert not track.stalled(0.05)
    restored = LossTrack(0.3)
    restored.load_state_dict(track.state_dict())
    assert math.isnan(restored.start)
