from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from entropy_monitor.cost import Cost

Duration = Callable[[int, bool], float]


def likely(cost: Cost, every: int) -> float:
    share = cost.share(every)
    assert share is not None
    assert 0 <= share.least <= share.likely <= share.most
    return share.likely


def ran(every: int, steps: int, duration: Duration, cost: Cost | None = None, first: int = 0) -> Cost:
    """Steps by a simulated clock, measured at multiples of `every`."""
    now = [0.0]
    if cost is None:
        cost = Cost(10, lambda: now[0])
    else:
        cost._clock = lambda: now[0]
        cost.pause()
    for step in range(first, first + steps):
        measured = step % every == 0
        now[0] += duration(step, measured)
        cost.end(step, measured)
    return cost


def test_what_a_measured_step_adds_over_the_steps_between() -> None:
    cost = ran(10, 200, lambda step, measured: 2.0 + 0.4 * measured)
    assert likely(cost, 10) == pytest.approx(0.4 / 2 / 10)
    assert likely(cost, 40) == pytest.approx(0.4 / 2 / 40)


def test_is_not_known_before_there_are_enough_steps() -> None:
    # of the measured steps 0, 10, 20 none counts; 30, …, 100 do
    assert ran(10, 100, lambda step, measured: 1.0).share(10) is None
    assert likely(ran(10, 101, lambda step, measured: 1.0), 10) == 0.0
    assert ran(1, 100, lambda step, measured: 1.0).share(1) is None  # no other step to compare with


def test_warm_up_evaluations_and_pauses_do_not_count() -> None:
    def duration(step: int, measured: bool) -> float:
        if step <= 20:
            return 500.0 * (1 + measured)  # compiling
        if step % 100 in (0, 1):
            return 900.0  # evaluation, and a checkpoint
        return 2.0 + 0.4 * measured

    assert likely(ran(10, 200, duration), 10) == pytest.approx(0.02)


@pytest.mark.parametrize("seed", range(20))
def test_bounds_hold_what_noise_hides(seed: int) -> None:
    draw = random.Random(seed)
    cost = ran(10, 1300, lambda step, measured: (1.0 + 0.2 * measured) * draw.gauss(1.0, 0.1))
    share = cost.share(10)
    assert share is not None
    assert share.most - share.least < 0.01
    assert share.least < 0.02 < share.most or abs(share.likely - 0.02) < 3 * (share.most - share.likely) / 2


def test_a_cheap_measurement_costs_nothing_rather_than_less() -> None:
    assert likely(ran(10, 120, lambda step, measured: 1.0 - 0.1 * measured), 10) == 0.0


def test_what_training_does_every_tenth_step_is_not_the_monitors() -> None:
    def logs(step: int, measured: bool) -> float:
        return 1.0 + 0.5 * (step % 10 == 0) + 0.1 * measured

    cost = ran(10, 200, logs)
    assert likely(cost, 10) == pytest.approx(0.06)  # nothing tells them apart
    cost = ran(20, 400, logs, cost, first=200)
    assert likely(cost, 20) == pytest.approx(0.1 / 20)
    cost = ran(10, 2000, logs, cost, first=600)
    assert likely(cost, 10) == pytest.approx(0.1 / 10)  # and it is remembered


def test_a_training_whose_steps_change_is_followed() -> None:
    cost = ran(10, 200, lambda step, measured: 1.0 + measured)
    cost = ran(10, 1000, lambda step, measured: 5.0 + measured, cost, first=200)
    assert likely(cost, 10) == pytest.approx(0.02)


def test_forgetting_measured_steps() -> None:
    cost = ran(10, 200, lambda step, measured: 1.0 + measured)
    cost.forget_measured()
    assert cost.share(10) is None
    cost = ran(10, 100, lambda step, measured: 1.0 + 3 * measured, cost, first=200)
    assert likely(cost, 10) == pytest.approx(0.3)


def test_a_clock_that_stands_still_says_nothing() -> None:
    assert ran(10, 100, lambda step, measured: 0.0).share(10) is None


def test_the_few_measured_steps_that_are_read_in_full_count_by_their_share() -> None:
    now = [0.0]
    cost = Cost(10, lambda: now[0], full_share=1 / 4)
    for step in range(800):
        measured, in_full = step % 10 == 0, step < 80 or step % 40 == 0
        now[0] += 2.0 + measured * (1.0 if in_full else 0.2)
        cost.end(step, measured, in_full)
    assert likely(cost, 10) == pytest.approx((0.75 * 0.1 + 0.25 * 0.5) / 10)
    cost.forget_measured()
    assert cost.share(10) is None
