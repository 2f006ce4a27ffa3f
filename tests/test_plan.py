from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from entropy_monitor.plan import EVERY, MOST_STEPS, ROWS, Change, Plan
from entropy_monitor.schedule import Schedule


@dataclass
class Training:
    """Steps by a simulated clock; what a measured step costs is given by the rows it reads.

    Attributes:
        cost: of a row, as a share of a step.
        fixed: cost of a measured step whatever the rows.
        full: cost of one that is read in full beside that.
        spread: of a batch, nats.
        error: standard error with one row, nats.
        tokens: of a sequence.
        noise: of durations, as a share.
        stride: of the numbers that steps bear.
        other: what else a step takes.
    """

    cost: float = 0.0
    fixed: float = 0.0
    full: float = 0.0
    spread: float = 1.0
    error: float = 0.0
    tokens: int = 10**6
    noise: float = 0.0
    stride: int = 1
    other: Callable[[int], float] = lambda call: 0.0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.now = 0.0
        given = {"rows": "auto", "every": "auto", **self.options}
        self.plan = Plan(**given, clock=lambda: self.now)
        self.schedule = Schedule(self.plan.every, spread=self.plan.every_moves)
        self.draw = np.random.default_rng(0)
        self.calls = 0
        self.spent = 0.0
        self.rows_read: list[int] = []
        self.measured: list[int] = []
        self.changes: list[Change] = []

    @property
    def texts(self) -> list[str]:
        return [change.text for change in self.changes]

    def run(self, calls: int) -> Training:
        for _ in range(calls):
            measured, in_full = self.schedule.due, self.schedule.in_full
            rows = self.tokens if self.plan.rows == "all" else min(self.plan.rows, self.tokens)
            extra = (self.fixed + self.cost * rows + self.full * in_full) * measured
            self.spent += extra
            noise = 1 + self.noise * self.draw.standard_normal()
            self.now += (1.0 + extra + self.other(self.calls)) * noise
            if measured:
                self.measured.append(self.calls)
                self.rows_read.append(rows)
                error = np.full(40, 0.0 if rows == self.tokens else self.error / rows**0.5)
                entropy = 3 + np.hypot(self.spread, error) * self.draw.standard_normal(40)
                self.plan.observe("heads", entropy, error)
            change = self.plan.end(measured, measured and in_full)
            self.changes += [] if change is None else [change]
            self.schedule.every = self.plan.every_now
            self.schedule.end(self.calls * self.stride, measured)
            self.calls += 1
        return self


def test_a_cheap_and_precise_monitor_stays_as_it_is() -> None:
    training = Training(cost=1e-4, error=0.1).run(2000)
    assert (training.plan.rows, training.plan.every, training.changes) == (ROWS, EVERY, [])
    assert len(training.measured) == 200


def test_an_expensive_monitor_measures_less_often_and_returns_when_it_is_cheap_again() -> None:
    training = Training(fixed=0.5).run(1000)  # 5 % at 1 in 10
    assert training.plan.every == 80
    assert all(change.is_rarer for change in training.changes)
    assert training.texts == [
        # Before steps with rows alone are known, those in full are known to cost a quarter of this.
        f"1 step in 20 is measured: measuring takes {0.5 / 4 / 10:.1%} of the time",
        "1 step in 40 is measured: measuring takes 2.5% of the time",
        f"1 step in 80 is measured: measuring takes {0.0125:.1%} of the time",
    ]
    training.run(5000)
    assert len(training.changes) == 3
    training.fixed = 0.01
    training.run(20_000)
    assert training.plan.every == EVERY
    assert [text.split(" is")[0] for text in training.texts[3:]] == [
        "1 step in 40",
        "1 step in 20",
        "1 step in 10",
    ]
    assert not any(change.is_rarer for change in training.changes[3:])


@pytest.mark.parametrize("stride", [1, 2, 8, 32, 1000])
def test_the_budget_is_kept_whatever_numbers_steps_bear(stride: int) -> None:
    training = Training(fixed=0.3, stride=stride).run(2000)
    training.spent = 0.0
    training.run(5000)
    assert 0.003 < training.spent / 5000 < 0.01


def test_what_is_read_in_full_counts() -> None:
    training = Training(fixed=0.02, full=0.4).run(3000)  # on average .12
    assert training.plan.every == 20
    assert Training(fixed=0.02, full=0.2).run(3000).plan.every == EVERY


@pytest.mark.parametrize("period", [2, 4, 8, 10, 20, 50])
@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_what_training_does_every_so_many_steps_does_not_count(period: int, noise: float) -> None:
    training = Training(fixed=0.02, noise=noise, other=lambda call: 0.5 * (call % period == 0)).run(5000)
    assert training.plan.every == EVERY, training.texts


@pytest.mark.parametrize("fixed", [0.05, 0.09, 0.1, 0.11, 0.2, 0.21, 0.7])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_does_not_flap(fixed: float, noise: float) -> None:
    training = Training(fixed=fixed, noise=noise, error=0.33 * ROWS**0.5).run(30_000)
    growth = [change for change in training.texts if change.startswith("1 step")]
    assert len(growth) <= 5, training.texts
    assert len(training.changes) - len(growth) <= 2, training.texts


@pytest.mark.parametrize("error", [0.2, 0.33, 0.5, 1.0])
def test_rows_do_not_flap_either(error: float) -> None:
    training = Training(error=error * ROWS**0.5).run(30_000)
    assert len(training.changes) <= 4, training.texts
    assert error / (training.plan.rows / ROWS) ** 0.5 < 0.4


def test_rows_grow_until_they_are_precise_enough_and_go_back() -> None:
    training = Training(error=ROWS**0.5).run(1500)  # the error is the spread: 9 times the rows are needed
    assert training.plan.rows == 16 * ROWS
    assert training.texts[0].startswith("64 rows of each sequence are read: the standard error was")
    training.error /= 10
    training.run(3000)
    assert training.plan.rows == ROWS


def test_all_rows_are_read_where_nothing_less_will_do_and_stay_so() -> None:
    training = Training(error=10 * ROWS**0.5, tokens=100).run(5000)
    assert set(training.rows_read[-100:]) == {100}
    assert len(training.changes) == 2
    training.spread = 100.0  # now the errors are nothing beside it
    training.run(3000)
    assert training.plan.rows == ROWS


def test_rows_follow_the_tolerance_and_steps_pay_for_them() -> None:
    # 32 rows have a standard error of .157 where a third of the spread is .097
    training = Training(cost=0.05 / 32, full=0.2, spread=0.29, error=0.157 * ROWS**0.5).run(20_000)
    assert training.plan.rows in (2 * ROWS, 4 * ROWS)
    assert 0.157 / (training.plan.rows / ROWS) ** 0.5 < 0.29 / 3 * 1.2
    assert training.plan.every in (2 * EVERY, 4 * EVERY)
    training.spent = 0.0
    training.run(10_000)
    assert training.spent / 10_000 < 0.0105


def test_rows_are_given_up_where_the_fewest_steps_are_too_dear() -> None:
    training = Training(cost=0.02, error=10 * ROWS**0.5).run(60_000)  # 64 rows cost 128 % of a step
    assert training.plan.every == MOST_STEPS
    assert training.plan.rows == 2 * ROWS
    changes = len(training.changes)
    training.run(60_000)
    assert len(training.changes) == changes  # and not asked for again and again


def test_a_wrong_account_of_the_cost_does_not_end_the_monitoring() -> None:
    training = Training(fixed=1e6).run(5000)
    assert training.plan.every == MOST_STEPS
    assert max(np.diff(training.measured)) < 2 * MOST_STEPS


def test_a_first_sign_brings_measurements_closer_for_a_while() -> None:
    training = Training(fixed=0.5).run(3000)
    assert training.plan.every == 80
    training.plan.suspect({"a"})
    start = len(training.measured)
    training.run(1000)
    gaps = np.diff(training.measured[start:])
    assert max(gaps[:7]) < 20
    assert min(gaps[8:]) > 20
    training.plan.suspect({"a"})  # still
    assert training.plan.every_now == 80
    training.plan.suspect({"a", "b"})
    assert training.plan.every_now == EVERY
    assert training.plan.every == 80


def test_looking_closely_is_resumed() -> None:
    whole = Training(fixed=0.5).run(3000)
    whole.plan.suspect({"a"})
    whole.run(30)
    state = json.loads(json.dumps(whole.plan.state_dict()))
    resumed = Plan("auto", "auto")
    resumed.load_state_dict(state)
    assert resumed.every_now == whole.plan.every_now == EVERY
    assert resumed.state_dict()["closely"] == state["closely"] < 8
    for plan in (whole.plan, resumed):
        for _ in range(state["closely"]):
            plan.end(True)
        plan.suspect({"a"})  # as before: no first sign
        assert plan.every_now == 80


def test_signs_after_a_long_time_are_first_ones_again() -> None:
    training = Training(fixed=0.5).run(3000)
    training.plan.suspect({"a"})
    training.run(7000)
    training.plan.suspect({"a"})
    assert training.plan.every_now == EVERY


def test_without_a_budget_every_stays_and_rows_grow() -> None:
    training = Training(fixed=10.0, error=ROWS**0.5, options={"budget": None}).run(3000)
    assert (training.plan.rows, training.plan.every) == (16 * ROWS, EVERY)


@pytest.mark.parametrize("every", [1, 10])
def test_rows_grow_where_every_is_given(every: int) -> None:
    training = Training(fixed=0.5, error=ROWS**0.5, options={"every": every}).run(3000)
    assert (training.plan.rows, training.plan.every) == (16 * ROWS, every)


@pytest.mark.parametrize("options", [{"rows": 32}, {"rows": "all"}])
def test_given_rows_are_kept(options: dict[str, Any]) -> None:
    training = Training(cost=1e-9, error=100.0, tokens=10**6, options=options).run(3000)
    assert training.plan.rows == options["rows"]
    assert not training.plan.adapt_to_batch
    assert training.changes == []


@pytest.mark.parametrize("every", [2, 10, 50])
def test_a_given_every_is_kept(every: int) -> None:
    training = Training(fixed=5.0, options={"every": every}).run(3000)
    training.plan.suspect({"a"})
    assert (training.plan.every, training.plan.every_now) == (every, every)
    assert training.measured == list(range(0, 3000, every))


def test_nothing_changes_where_other_processes_measure_too() -> None:
    training = Training(fixed=5.0, error=100.0, options={"fixed": True}).run(3000)
    training.plan.suspect({"a"})
    assert (training.plan.rows, training.plan.every_now, training.changes) == (ROWS, EVERY, [])
    assert training.plan.adapt_to_batch
    assert training.measured == list(range(0, 3000, 10))
    training.plan.load_state_dict(Training(fixed=0.5, error=ROWS**0.5).run(2000).plan.state_dict())
    assert (training.plan.rows, training.plan.every) == (ROWS, EVERY)


@pytest.mark.parametrize("options", [{"fixed": 0.5}, {"fixed": 0.01, "error": ROWS**0.5}])
def test_the_plan_is_resumed(options: dict[str, Any]) -> None:
    whole = Training(**options).run(3000)
    planned = whole.plan.rows, whole.plan.every
    assert planned != (ROWS, EVERY)
    state = json.loads(json.dumps(whole.plan.state_dict()))
    resumed = Training(**options)
    resumed.plan.load_state_dict(state)
    assert (resumed.plan.rows, resumed.plan.every) == planned
    assert resumed.run(5000).changes == []
    given = Plan(48, 5)
    given.load_state_dict(state)
    assert (given.rows, given.every) == (48, 5)


def test_resumed_often_it_still_adapts() -> None:
    training = Training(fixed=0.5).run(3000)
    training.fixed = 0.001
    for _ in range(30):
        state, schedule = training.plan.state_dict(), training.schedule.state_dict()
        training = Training(fixed=0.001)
        training.plan.load_state_dict(state)
        training.schedule.load_state_dict(schedule)
        training.run(600)
    assert training.plan.every == EVERY


@pytest.mark.parametrize(("every", "expected"), [(3000, MOST_STEPS), (25, 40), (1, EVERY), (80, 80)])
def test_a_given_every_of_the_checkpoint_becomes_one_of_ours(every: int, expected: int) -> None:
    plan = Plan("auto", "auto")
    plan.load_state_dict({**plan.state_dict(), "every": every})
    assert plan.every == expected


def test_readings_without_a_standard_error_change_nothing() -> None:
    training = Training(error=float("nan")).run(2000)
    assert training.changes == []
