from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from entropy_monitor.plan import EVERY, ROWS, Plan
from entropy_monitor.schedule import Schedule


@dataclass
class Training:
    """Steps by a simulated clock; what a measured step costs is given by the rows it reads.

    Attributes:
        cost: of a row, as a share of a step.
        fixed: cost of a measured step whatever the rows.
        spread: of a batch, nats.
        error: standard error with one row, nats.
        tokens: of a sequence.
        noise: of durations, as a share.
    """

    cost: float = 0.0
    fixed: float = 0.0
    spread: float = 1.0
    error: float = 0.0
    tokens: int = 10**6
    noise: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.now = 0.0
        given = {"rows": "auto", "every": "auto", **self.options}
        self.plan = Plan(**given, clock=lambda: self.now)
        self.schedule = Schedule(self.plan.every)
        self.draw = np.random.default_rng(0)
        self.rows_read: list[int] = []
        self.measured: list[int] = []
        self.changes: list[str] = []

    def run(self, steps: int) -> Training:
        for _ in range(steps):
            step, measured = self.schedule.next, self.schedule.due
            rows = self.tokens if self.plan.rows == "all" else min(self.plan.rows, self.tokens)
            extra = (self.fixed + self.cost * rows) * measured
            self.now += (1.0 + extra) * (1 + self.noise * self.draw.standard_normal())
            if measured:
                self.measured.append(step)
                self.rows_read.append(rows)
                error = np.full(40, 0.0 if rows == self.tokens else self.error / rows**0.5)
                entropy = 3 + np.hypot(self.spread, error) * self.draw.standard_normal(40)
                self.plan.observe("heads", entropy, error)
            change = self.plan.end(step, measured)
            self.changes += [] if change is None else [change]
            self.schedule.every = self.plan.every
            self.schedule.end(step, measured)
        return self


def test_a_cheap_and_precise_monitor_stays_as_it_is() -> None:
    training = Training(cost=1e-4, error=0.1).run(2000)
    assert (training.plan.rows, training.plan.every, training.changes) == (ROWS, EVERY, [])
    assert training.measured == list(range(0, 2000, 10))


def test_an_expensive_monitor_measures_less_often_and_returns_when_it_is_cheap_again() -> None:
    training = Training(fixed=0.5).run(300)  # 5 % at 1 in 10
    assert training.plan.every == 80
    assert training.changes == ["1 step in 80 is measured: measuring took 5.0% of the time"]
    training.run(5000)
    assert len(training.changes) == 1
    training.fixed = 0.01
    training.run(20_000)
    assert training.plan.every == EVERY
    assert [c.split(" is")[0] for c in training.changes[1:]] == [
        "1 step in 40",
        "1 step in 20",
        "1 step in 10",
    ]


@pytest.mark.parametrize("fixed", [0.05, 0.09, 0.1, 0.11, 0.2, 0.21, 0.7])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_does_not_flap(fixed: float, noise: float) -> None:
    training = Training(fixed=fixed, noise=noise, error=0.33 * ROWS**0.5, options={"budget": 0.01}).run(
        30_000
    )
    assert len(training.changes) <= 2, training.changes


@pytest.mark.parametrize("error", [0.2, 0.33, 0.5, 1.0])
def test_rows_do_not_flap_either(error: float) -> None:
    training = Training(error=error * ROWS**0.5).run(30_000)
    assert len(training.changes) <= 4, training.changes
    assert error / (training.plan.rows / ROWS) ** 0.5 < 0.4


def test_rows_grow_until_they_are_precise_enough_and_go_back() -> None:
    training = Training(error=ROWS**0.5).run(1500)  # the error is the spread: 9 times the rows are needed
    assert training.plan.rows == 16 * ROWS
    assert training.changes[0].startswith("64 rows of each sequence are read: the standard error was")
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


def test_rows_grow_only_as_far_as_the_budget_goes() -> None:
    training = Training(cost=0.0005, error=10 * ROWS**0.5).run(5000)  # 32 rows cost 0.16 % at 1 in 10
    assert training.plan.rows == 4 * ROWS
    assert training.plan.every == EVERY
    training.cost *= 4
    training.run(5000)
    assert training.plan.rows == ROWS
    assert training.plan.every == EVERY


def test_rows_go_back_before_fewer_steps_are_measured() -> None:
    training = Training(cost=0.0005, error=10 * ROWS**0.5).run(5000)
    training.cost *= 40
    training.run(10_000)
    assert training.plan.rows == ROWS
    assert [c.split()[1] for c in training.changes] == ["rows"] * 4 + ["step"]
    assert training.plan.every == 80


def test_a_wrong_account_of_the_cost_does_not_end_the_monitoring() -> None:
    assert Training(fixed=1e6).run(5000).plan.every == 640


def test_without_a_budget_every_stays_and_rows_grow() -> None:
    training = Training(fixed=10.0, error=ROWS**0.5, options={"budget": None}).run(3000)
    assert (training.plan.rows, training.plan.every) == (16 * ROWS, EVERY)


@pytest.mark.parametrize("options", [{"rows": 32}, {"rows": "all"}])
def test_given_rows_are_kept(options: dict[str, Any]) -> None:
    training = Training(cost=1e-9, error=100.0, tokens=10**6, options=options).run(3000)
    assert training.plan.rows == options["rows"]
    assert not training.plan.adapt_to_batch
    assert training.changes == []


@pytest.mark.parametrize("every", [2, 10, 50])
def test_a_given_every_is_kept(every: int) -> None:
    training = Training(fixed=5.0, options={"every": every}).run(3000)
    assert training.plan.every == every
    assert training.measured == list(range(0, 3000, every))


def test_nothing_changes_where_other_processes_measure_too() -> None:
    training = Training(fixed=5.0, error=100.0, options={"fixed": True}).run(3000)
    assert (training.plan.rows, training.plan.every, training.changes) == (ROWS, EVERY, [])
    assert training.plan.adapt_to_batch
    training.plan.load_state_dict({"rows": 64, "every": 80})
    assert (training.plan.rows, training.plan.every) == (ROWS, EVERY)


def test_one_step_is_measured_in_every_block_whatever_changes() -> None:
    training = Training(fixed=0.5).run(300)
    training.fixed = 0.001
    training.run(20_000)
    blocks = [step // EVERY for step in training.measured]
    assert len(blocks) == len(set(blocks))
    gaps = {b - a for a, b in zip(training.measured, training.measured[1:], strict=False)}
    assert gaps <= {10, 20, 30, 40, 50, 60, 70, 80}
    assert {step % 10 for step in training.measured} == {0}


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


def test_readings_without_a_standard_error_change_nothing() -> None:
    training = Training(error=float("nan")).run(2000)
    assert training.changes == []
