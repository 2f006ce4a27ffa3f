from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from entropy_monitor.analyzer import Analyzer
from entropy_monitor.records import Record
from tests.analyzer.series import brief, digits, keys, play, record

KIND = "uniform_attention"


def run(
    share: Callable[[int], object], loss: Callable[[int], float | None], records: int = 60, every: int = 10
) -> list[Record]:
    return [record(every * i, keys(3, 2), share=share(i), loss=loss(i)) for i in range(records)]


def noisy(step: int) -> float:
    return float(2.3 + 0.03 * np.random.default_rng(step).standard_normal())


def test_uniform_and_stalled_opens_once_after_the_patience() -> None:
    events = play(Analyzer(), run(lambda _: 0.995, noisy, records=200))
    assert [event.event for event in events] == ["opened"]
    alert = events[0].alert
    assert 300 <= events[0].step <= 500
    assert (alert.layer, alert.heads, alert.severity) == ("", (), "warning")
    assert alert.title == "Attention is stuck at uniform in 3 of 3 layers, and the loss stands still"
    assert "entropy at least 98 % of its maximum" in alert.message
    assert "the loss has stayed near 2.29" in alert.message


@pytest.mark.parametrize(
    ("share", "loss"),
    [
        pytest.param(lambda _: 0.995, lambda _: None, id="no loss given"),
        pytest.param(lambda _: 0.995, lambda i: 2.3 * 0.99**i, id="loss moves"),
        pytest.param(lambda _: 0.9, noisy, id="not uniform"),
        pytest.param(lambda _: [0.99, 0.9] * 3, noisy, id="a head of every layer looks somewhere"),
        pytest.param(lambda i: 0.995 if i < 25 else 0.9, noisy, id="finds its way"),
    ],
)
def test_silent(share: Callable[[int], object], loss: Callable[[int], float | None]) -> None:
    assert play(Analyzer(), run(share, loss)) == []


def test_measuring_every_step_does_not_shorten_the_patience() -> None:
    events = play(Analyzer(), run(lambda _: 0.995, lambda _: 2.3, records=320, every=1))
    assert brief(events) == [("opened", 301, KIND)]


@pytest.mark.parametrize("stop", [5, 20, 40])
def test_a_restart_does_not_start_the_count_afresh(stop: int) -> None:
    records = run(lambda _: 0.995, noisy)
    unbroken = play(Analyzer(), records)
    first, second = Analyzer(), Analyzer()
    before = play(first, records[:stop])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + play(second, records[stop:]) == unbroken


def test_closes_when_attention_moves() -> None:
    events = play(Analyzer(), run(lambda i: 0.995 if i < 45 else 0.8, lambda _: 2.3))
    assert brief(events) == [("opened", 310, KIND), ("closed", 470, KIND)]


def test_the_recorded_stuck_run_is_found() -> None:
    events = play(Analyzer(), digits("stuck"))
    assert (events[0].event, events[0].alert.kind) == ("opened", KIND)
    assert "4 of 6 layers" in events[0].alert.title
