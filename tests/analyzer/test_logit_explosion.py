from __future__ import annotations

import numpy as np
import pytest

from entropy_monitor.analyzer import Analyzer, Thresholds
from entropy_monitor.records import AlertEvent, Record
from tests.analyzer.series import brief, digits, keys, play, record

KIND = "logit_explosion"


def run(logits: list[float] | list[list[float]]) -> list[Record]:
    return [record(10 * i, keys(1, 2), max_logit=logit) for i, logit in enumerate(logits)]


def test_growth_past_the_level_opens_after_two_records() -> None:
    events = play(Analyzer(), run([1.5, 3, 20, 100, 300, 500, 500]))
    assert brief(events) == [("opened", 50, KIND)]
    alert = events[0].alert
    assert alert.title == "Attention logits have exploded in blocks.0.attn (all 2 heads): the largest is 500"
    assert "the first sign was at step 40" in alert.message
    assert "differ by less than 2" in alert.message
    assert "The largest logit has grown 333× (1.5 to 500)" in alert.message
    assert "em.QKClip(model, optimizer, threshold=50)" in alert.advice
    assert alert.evidence["max_logit_at_start"] == 1.5


@pytest.mark.parametrize(
    "logits",
    [
        pytest.param([600.0] * 30, id="large since birth"),
        pytest.param([300.0 + 10 * i for i in range(60)], id="large since birth, grows a little"),
        pytest.param([2.0, 5, 20, 80, 150] + [200] * 30, id="below the level"),
        pytest.param(([2.0] * 9 + [400.0]) * 5, id="single spikes"),
        pytest.param([1.0] * 5 + [5000.0, 400, 380, 360, 340, 320, 300], id="a spike that dies away"),
        pytest.param([-50.0] * 5 + [-1.0] * 20, id="negative"),
        pytest.param([-np.inf] * 20, id="all masked"),
        pytest.param([np.nan] * 2 + [600.0] * 20, id="known late"),
    ],
)
def test_silent(logits: list[float]) -> None:
    events = [event for event in play(Analyzer(), run(logits)) if event.alert.kind == KIND]
    assert events == []


def test_severe_from_a_thousand_and_told_again_at_fourfold() -> None:
    logits = [1.0, 50] + [260 * 1.26**i for i in range(16)]
    events = play(Analyzer(), run(logits))
    assert [event.event for event in events] == ["opened"] + ["updated"] * 2
    assert [event.alert.severity for event in events] == ["warning"] + ["severe"] * 2


def test_closes_below_half_of_the_level() -> None:
    logits = [1.0, 50, 300, 600] + [140.0] * 5 + [100.0] * 3
    assert brief(play(Analyzer(), run(logits))) == [("opened", 30, KIND), ("closed", 110, KIND)]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, [("opened", 30, KIND), ("closed", 110, KIND)]),
        ({"logit_release": 0.3}, [("opened", 30, KIND)]),
        ({"logit_release": 0.6}, [("opened", 30, KIND), ("closed", 60, KIND)]),
        ({"logit_least_start": 100.0}, []),
        ({"logit_trend": 1.0}, [("opened", 30, KIND), ("closed", 110, KIND)]),
    ],
)
def test_its_own_limits_decide(limits: dict[str, float], expected: list[tuple[str, int, str]]) -> None:
    logits = [1.0, 50, 300, 600] + [140.0] * 5 + [100.0] * 3
    assert brief(play(Analyzer(Thresholds(**limits)), run(logits))) == expected  # type: ignore[arg-type]


def test_a_quick_trend_forgets_what_is_steady() -> None:
    steady = run([1.0, 300, 300, 300])
    assert brief(play(Analyzer(), steady)) == [("opened", 20, KIND)]
    assert play(Analyzer(Thresholds(logit_trend=1.0)), steady) == []


def test_infinity_is_left_to_the_other_detector_and_enters_no_baseline() -> None:
    logits = [1.0, np.inf, np.inf, 50, 300, 600, 700]
    events = [event for event in play(Analyzer(), run(logits)) if event.alert.kind == KIND]
    assert brief(events) == [("opened", 50, KIND)]


def kinds(events: list[AlertEvent]) -> set[str]:
    return {event.alert.kind for event in events}


def test_on_recorded_runs() -> None:
    assert KIND in kinds(play(Analyzer(), digits("collapse")))
    assert KIND not in kinds(play(Analyzer(), digits("sharp")))
