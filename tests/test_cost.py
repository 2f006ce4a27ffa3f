from __future__ import annotations

import json
import random
from collections.abc import Callable

import pytest

from entropy_monitor.cost import Cost
from entropy_monitor.schedule import IN_FULL, Schedule

Duration = Callable[[int, bool, bool], float]


class Run:
    """Steps by a simulated clock."""

    def __init__(self, every: int, duration: Duration) -> None:
        self.now = 0.0
        self.every, self.duration = every, duration
        self.cost = Cost(1 / IN_FULL, lambda: self.now)
        self.schedule = Schedule(every, spread=True)

    def steps(self, count: int) -> Run:
        for _ in range(count):
            step, measured = self.schedule.next, self.schedule.due
            in_full = measured and self.schedule.in_full
            self.now += self.duration(step, measured, in_full)
            self.cost.end(measured, in_full)
            self.schedule.end(step, measured)
        return self

    def likely(self, every: int | None = None) -> float:
        share = self.cost.share(every or self.every)
        assert share is not None
        assert 0 <= share.least <= share.likely <= share.most
        return share.likely


def constant(rows: float, full: float) -> Duration:
    return lambda step, measured, in_full: 2.0 * (1 + (full if in_full else rows) * measured)


def test_steps_in_full_count_by_their_share() -> None:
    run = Run(10, constant(0.2, 0.6)).steps(400)
    assert run.likely(10) == pytest.approx((0.75 * 0.2 + 0.25 * 0.6) / 10)
    assert run.likely(40) == pytest.approx((0.75 * 0.2 + 0.25 * 0.6) / 40)


def test_is_bounded_from_below_before_both_kinds_are_known() -> None:
    run = Run(10, constant(0.2, 0.6))
    assert run.steps(60).cost.share(10) is None
    share = run.steps(20).cost.share(10)  # eight measurements, all in full
    assert share is not None
    assert share.least == pytest.approx(0.25 * 0.6 / 10)
    assert share.most == float("inf")


def test_every_step_measured_leaves_none_to_compare_with() -> None:
    assert Run(1, constant(0.2, 0.6)).steps(200).cost.share(1) is None


def test_warm_up_evaluations_and_pauses_do_not_count() -> None:
    def duration(step: int, measured: bool, in_full: bool) -> float:
        if step <= 25:
            return 500.0 * (1 + measured)  # compiling
        return 900.0 if step % 50 in (0, 1) else 2.0 + 0.4 * measured

    assert Run(10, duration).steps(1500).likely() == pytest.approx(0.02)


@pytest.mark.parametrize("period", [2, 3, 4, 5, 8, 10, 20, 40])
def test_what_training_does_every_so_many_steps_is_not_the_monitors(period: int) -> None:
    def logs(step: int, measured: bool, in_full: bool) -> float:
        return 1.0 + 0.5 * (step % period == 0) + 0.1 * measured

    run = Run(10, logs).steps(2000)
    share = run.cost.share(10)
    assert share is not None
    assert abs(share.likely - 0.01) < 0.01
    assert share.least < 0.015


@pytest.mark.parametrize("seed", range(20))
def test_bounds_hold_what_noise_hides(seed: int) -> None:
    draw = random.Random(seed)
    noisy = Run(10, lambda step, measured, in_full: (1.0 + 0.2 * measured) * draw.gauss(1.0, 0.1))
    share = noisy.steps(1300).cost.share(10)
    assert share is not None
    assert share.most - share.least < 0.015
    assert abs(share.likely - 0.02) < 3 * (share.most - share.likely) / 2


def test_a_cheap_measurement_costs_nothing_rather_than_less() -> None:
    assert Run(10, constant(-0.1, -0.1)).steps(300).likely() == 0.0


def test_a_training_whose_steps_change_is_followed() -> None:
    run = Run(10, constant(1.0, 1.0)).steps(300)
    run.duration = lambda step, measured, in_full: 5.0 + measured
    assert run.steps(1500).likely() == pytest.approx(0.02)


def test_other_rows_cost_something_else_and_the_rest_what_it_did() -> None:
    run = Run(10, constant(0.2, 0.6)).steps(400)
    run.cost.other_rows()
    assert run.cost.share(10) is None
    run.duration = constant(0.5, 0.9)
    assert run.steps(60).likely() == pytest.approx((0.5 + 0.25 * 0.4) / 10)


def test_a_clock_that_stands_still_says_nothing() -> None:
    assert Run(10, lambda step, measured, in_full: 0.0).steps(300).cost.share(10) is None


def test_is_kept() -> None:
    run = Run(10, constant(0.2, 0.6)).steps(400)
    run.cost.other_rows()
    run.steps(60)
    resumed = Run(10, constant(0.2, 0.6))
    resumed.cost.load_state_dict(json.loads(json.dumps(run.cost.state_dict())))
    assert resumed.likely() == run.likely()
