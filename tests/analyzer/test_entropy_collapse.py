from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from entropy_monitor.analyzer import Analyzer, Thresholds
from tests.analyzer.series import brief, digits, fall, keys, play, record

KIND = "entropy_collapse"
SUDDEN = [0.97] * 5 + [0.05] * 10


def test_a_fall_opens_one_alert_after_two_records() -> None:
    events = play(Analyzer(), fall(SUDDEN))
    assert brief(events) == [("opened", 60, KIND)]
    alert = events[0].alert
    assert (alert.layer, alert.heads, alert.severity, alert.opened) == (
        "blocks.0.attn",
        (0, 1, 2, 3),
        "severe",
        50,
    )
    assert alert.title == "Attention entropy has collapsed in blocks.0.attn (all 4 heads)"
    assert (
        "furthest in head 0: to 5.0 % of its maximum (0.139 of 2.77 nats) from 97 % at step 0; "
        "the first sign was at step 50" in alert.message
    )
    assert "checkpoint from before step 50" in alert.advice
    assert alert.evidence["worst_head"] == 0
    assert alert.evidence["call"] == 0
    assert alert.evidence["opened_share"] == pytest.approx(0.05)
    assert alert.evidence["share_at_start"] == pytest.approx(0.97)


@pytest.mark.parametrize(
    "shares",
    [
        pytest.param([0.97] * 50, id="sound"),
        pytest.param([0.03] * 50, id="sharp since birth"),
        pytest.param([0.22] * 10 + [0.06] * 30, id="never high"),
        pytest.param(np.geomspace(0.97, 0.1, 100), id="sharpens to ten percent"),
        pytest.param(np.geomspace(0.97, 0.03, 1000), id="sharpens slowly"),
        pytest.param(([0.9] * 5 + [0.02]) * 10, id="single spikes"),
        pytest.param([0.9, 0.15] * 20, id="oscillates above the level"),
        pytest.param([0.97] * 5 + [0.15] * 30, id="falls to what sound runs end with"),
    ],
)
def test_silent(shares: list[float]) -> None:
    assert play(Analyzer(), fall(shares)) == []


def test_the_bottom_counts_however_slow_the_way() -> None:
    events = play(Analyzer(), fall(np.geomspace(0.97, 0.005, 2000)))
    assert [event.event for event in events][:1] == ["opened"]
    assert 0.018 < events[0].alert.evidence["entropy_share"] <= 0.02


def test_half_of_a_layer_may_be_sharp() -> None:
    def run(low: int) -> list[str]:
        shares = [np.full(4, 0.97)] * 5 + [np.array([0.05] * low + [0.9] * (4 - low))] * 5
        return [event.event for event in play(Analyzer(), fall(shares))]

    assert run(2) == []
    assert run(3) == ["opened"]


def test_one_head_is_enough_when_its_logits_explode() -> None:
    share = np.array([0.05, 0.9, 0.9, 0.9])
    logit = np.array([300.0, 2.0, 2.0, 2.0])
    records = fall([np.full(4, 0.97)] * 5) + [
        record(10 * i, keys(1, 4), share=share, max_logit=logit) for i in range(5, 10)
    ]
    event = play(Analyzer(), records)[0]
    assert event.alert.kind == KIND
    assert event.alert.heads == (0,)
    assert event.alert.severity == "warning"
    assert event.alert.title == "Attention entropy is collapsing in blocks.0.attn (head 0 of 4)"


@pytest.mark.parametrize(
    ("loss", "logit", "found"),
    [(2.3, 80.0, True), (1.0, 80.0, False), (2.3, 20.0, False), (None, 80.0, False)],
)
def test_half_way_down_is_early_only_with_large_logits_and_a_stalled_loss(
    loss: float | None, logit: float, found: bool
) -> None:
    start = fall([0.97] * 5, loss=None if loss is None else 2.3)
    later = [record(10 * i, keys(1, 4), share=0.25, max_logit=logit, loss=loss) for i in range(5, 12)]
    events = play(Analyzer(), start + later)
    assert bool(events) is found
    if found:
        assert events[0].alert.severity == "warning"
        assert "The loss has not improved (2.3 at the start, 2.3 now)" in events[0].alert.message


def test_closes_after_three_records_above_the_release_and_not_before() -> None:
    shares = SUDDEN + [0.25] * 5 + [0.5] * 2 + [0.3] + [0.5] * 3
    events = play(Analyzer(), fall(shares))
    assert brief(events) == [("opened", 60, KIND), ("closed", 10 * (len(shares) - 1), KIND)]
    assert events[1].alert.title.startswith("Over: Attention entropy has collapsed")


def test_an_oscillating_layer_is_one_alert() -> None:
    events = play(Analyzer(), fall([0.97] * 5 + [0.04, 0.04, 0.5, 0.5] * 10))
    assert brief(events) == [("opened", 60, KIND)]


def test_grows_with_heads_and_depth_and_says_so_only_then() -> None:
    shares = (
        [np.full(4, 0.97)] * 5
        + [np.array([0.06, 0.06, 0.06, 0.9])] * 5
        + [np.full(4, 0.06)] * 5
        + [np.full(4, 0.029)] * 5
    )
    events = play(Analyzer(), fall(shares))
    assert brief(events) == [("opened", 60, KIND), ("updated", 110, KIND), ("updated", 150, KIND)]
    assert [event.alert.heads for event in events] == [(0, 1, 2)] + [(0, 1, 2, 3)] * 2
    assert {event.alert.id for event in events} == {"entropy_collapse-0001"}


def test_spikes_of_nan_and_masked_rows_leave_the_history_alone() -> None:
    records = fall(SUDDEN)
    for i in (2, 3):
        heads: Any = records[i].heads
        heads["entropy"][:] = np.nan
        heads["rows_read"][:] = 0
    assert brief(play(Analyzer(), records)) == [("opened", 60, KIND)]


def test_one_key_rows_are_not_judged() -> None:
    records = fall([0.97] * 5, max_entropy=0.3) + fall([0.0] * 5, max_entropy=0.3)
    records += fall([0.0] * 5, max_entropy=0.0, entropy=0.0)
    assert play(Analyzer(), records) == []


def test_calls_of_one_layer_are_watched_apart_and_told_together() -> None:
    heads = keys(1, 2, calls=2)
    share = np.array([0.9, 0.9, 0.05, 0.05])
    half = [record(10 * i, heads, share=0.97 if i < 5 else share) for i in range(8)]
    assert play(Analyzer(), half) == []
    events = play(Analyzer(Thresholds(collapse_layer_fraction=0.5)), half)
    assert events[0].alert.heads == (0, 1)
    assert events[0].alert.evidence["call"] == 1


def test_layers_that_are_skipped_now_and_then_keep_their_alert() -> None:
    both, second = keys(2, 4), [key for key in keys(2, 4) if key[0] == "blocks.1.attn"]
    share = np.array([0.04] * 4 + [0.9] * 4)
    records = [record(i, both, share=0.97) for i in range(3)]
    records += [record(i, both, share=share) for i in range(3, 6)]
    records += [record(i, second, share=0.9) for i in range(6, 20)]
    records += [record(20, both, share=share)]
    assert brief(play(Analyzer(), records)) == [("opened", 4, KIND)]


def test_the_recorded_collapse_is_found_early() -> None:
    events = [event for event in play(Analyzer(), digits("collapse")) if event.alert.kind == KIND]
    assert events[0].event == "opened"
    assert events[0].step <= 100
    assert events[0].alert.evidence["loss"] > 2.0
    assert max(event.alert.severity == "severe" for event in events)


@pytest.mark.parametrize("name", ["sound", "hot", "sharp"])
def test_recorded_sound_runs_raise_nothing(name: str) -> None:
    assert play(Analyzer(), digits(name)) == []
