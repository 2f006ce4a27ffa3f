"""A plain callable as a sink."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from entropy_monitor import EntropyMonitor
from entropy_monitor.dashboards import FunctionLogger
from entropy_monitor.errors import ConfigurationError
from entropy_monitor.records import HEADS, Record
from entropy_monitor.trackers.aggregates import aggregate_layers
from entropy_monitor.trackers.whole_model import WholeModel
from tests.dashboards.records_factory import event, info, record
from tests.training import tiny, train


class Tracker:
    """What trackers look like."""

    def __init__(self) -> None:
        self.rows: list[tuple[dict[str, float], int]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((metrics, step or 0))

    def __call__(self, metrics: dict[str, float], step: int) -> None:
        self.log_metrics(metrics, step)


def test_it_gets_every_aggregate_of_every_record() -> None:
    tracker = Tracker()
    logger = FunctionLogger(tracker.log_metrics)
    logger.open(info())
    for step in (0, 10):
        logger.log(record(step))
        logger.alert(event(step=step, alert_id=str(step), opened=step))
    logger.close()
    logger.close()
    for (given, step), expected in zip(tracker.rows, (0, 10), strict=True):
        named = WholeModel().metrics(aggregate_layers(record(step)))
        loss = {"attention/train/loss": 4.0 - step / 100}
        assert step == expected
        assert given == named | loss | {"attention/open_alerts": expected / 10}
        assert all(type(value) is float for value in given.values())


def test_what_is_not_finite_is_handed_on_and_what_is_not_known_is_not_there() -> None:
    tracker = Tracker()
    logger = FunctionLogger(tracker)
    logger.open(info())
    logger.log(record(0, entropy=math.nan))
    (given, _), *_ = tracker.rows
    assert math.isnan(given["attention/layer_00/entropy_min"])
    assert not [name for name in given if name.endswith(("floor_weights", "sigma_v"))]


def test_it_is_called_for_measured_steps_alone() -> None:
    tracker = Tracker()
    logger = FunctionLogger(tracker)
    logger.open(info())
    logger.log(Record(3, HEADS.empty(), scalars=record(3).scalars))
    assert tracker.rows == []


def test_layers_are_bounded() -> None:
    tracker = Tracker()
    logger = FunctionLogger(tracker, max_layers=3)
    logger.open(info())
    logger.log(record(0, layers=100))
    (given, _), *_ = tracker.rows
    places = {name.split("/")[1] for name in given}
    assert {place for place in places if place.startswith("layer_")} == {"layer_00", "layer_50", "layer_99"}


def test_it_begins_anew_with_another_run_and_other_ranks_say_nothing() -> None:
    tracker = Tracker()
    logger = FunctionLogger(tracker)
    logger.open(info(rank=1))
    logger.log(record(0))
    logger.alert(event())
    assert tracker.rows == []
    logger.open(info())
    logger.log(record(0))
    assert tracker.rows[0][0]["attention/open_alerts"] == 0


def test_a_callable_among_the_loggers_of_a_training(tmp_path: Path) -> None:
    tracker, printed = Tracker(), list[int]()
    model = tiny()
    monitor = EntropyMonitor(
        model,
        run_dir=tmp_path / "run",
        every=2,
        loggers=[tracker.log_metrics, lambda metrics, step: printed.append(step)],
    )
    train(model, torch.optim.SGD(model.parameters(), 0.1), 5, monitor.step)
    monitor.close()
    assert [step for _, step in tracker.rows] == printed == [0, 2, 4]
    assert all("attention/all/entropy_mean" in given for given, _ in tracker.rows)
    assert not monitor.faults


def test_one_that_raises_costs_the_training_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def broken(metrics: dict[str, float], step: int) -> None:
        raise OSError("the tracker is gone")

    model = tiny()
    monitor = EntropyMonitor(model, run_dir=tmp_path / "run", every=1, loggers=[broken])
    train(model, torch.optim.SGD(model.parameters(), 0.1), 3, monitor.step)
    monitor.close()
    assert monitor.faults == {"FunctionLogger": 1}
    assert "the tracker is gone" in caplog.text


async def awaited(metrics: dict[str, float], step: int) -> None: ...


def without_step(metrics: dict[str, float]) -> None: ...


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (3, "3 cannot be a logger; a function that is one takes two arguments"),
        (Tracker, "Tracker cannot be a logger"),
        (without_step, "without_step cannot be a logger: too many positional"),
        (awaited, "awaited is a coroutine function, which nothing would await"),
    ],
)
def test_refuses_what_cannot_be_called_so(function: Any, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        FunctionLogger(function)


@pytest.mark.parametrize("function", [print, dict.update, functools.partial(print, "x"), Tracker()])
def test_takes_all_that_can(function: Any) -> None:
    FunctionLogger(function)


def test_refuses_a_number_of_layers_that_is_none() -> None:
    with pytest.raises(ConfigurationError, match="max_layers is -1"):
        FunctionLogger(print, max_layers=-1)
