"""What a measured step costs once its figures are there: analysing them, and handing them to the sinks.

`python benchmarks/pipeline.py`. Prints, for 10², 10³ and 10⁴ heads, milliseconds of CPU time, medians, which
others on the machine disturb less than the clock:

- on the training thread, all of `EntropyMonitor.step` from one measurement to the next, ten steps, with the
  default settings: from the harvest to the events, the plan and the budget, which layers are suspects, and
  what the nine steps between take. All figures are there in each record, as in those that are read in full;
  to make them is no part of it. With warm caches, and with caches that hold nothing of it, which is worse
  than a training step leaves them;
- of that, what the measured step alone takes;
- on the thread of each sink (what a sink does in Python holds the interpreter lock).
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from models import machine
from torch import Tensor, nn

import entropy_monitor
from entropy_monitor import EntropyMonitor
from entropy_monitor.dashboards import TensorBoardLogger, WandbLogger
from entropy_monitor.hooks import FIGURES, Harvest, Recorder
from entropy_monitor.hooks.recorder import HeadIndex
from entropy_monitor.hooks.weights import UPDATE_FIGURES
from entropy_monitor.plan import Plan
from entropy_monitor.records import Record, RunInfo, Sink
from entropy_monitor.store import RunWriter

EVERY = 10  # steps between the records that sinks are given
_CACHE = np.zeros(1 << 23)  # 64 MiB, more than the caches of a core
_TYPICAL = {
    "entropy": 4.0,
    "entropy_se": 0.01,
    "max_entropy": 6.0,
    "rows_read": 1024.0,
    "max_logit": 5.0,
    "floor_row": 2.0,
}
_SMALL = 0.5  # for every other figure


@dataclass(frozen=True)
class Shape:
    """What a record holds.

    Attributes:
        layers: attention layers.
        heads: of each.
        alerts: layers whose attention is not finite: each has an alert open from the first record on.
    """

    layers: int
    heads: int
    alerts: int = 0

    def __str__(self) -> str:
        alerts = f", {self.alerts} alerts open" if self.alerts else ""
        return f"{self.layers * self.heads} heads ({self.layers} × {self.heads}{alerts})"


SHAPES = (Shape(10, 10), Shape(25, 40), Shape(50, 20, alerts=50), Shape(100, 100))
SMOKE = (Shape(2, 4), Shape(3, 2, alerts=2))


class Keeper(Sink):
    """Keeps what it gets."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def log(self, record: Record) -> None:
        self.records.append(record)


def harvests(shape: Shape) -> Callable[[int], tuple[Harvest, Tensor]]:
    """Gives the figures of a step: sound ones that move a little, but for the layers that are to alarm."""
    rng = np.random.default_rng(0)
    rows = shape.layers * shape.heads
    names = [f"model.layers.{i}.self_attn" for i in range(shape.layers)]
    middle = np.array([[_TYPICAL.get(name, _SMALL)] for name in FIGURES], dtype=np.float32)

    def at(step: int) -> tuple[Harvest, Tensor]:
        figures = middle * (1 + 0.02 * rng.standard_normal((len(FIGURES), rows), dtype=np.float32))
        figures[FIGURES.index("rows_read")] = _TYPICAL["rows_read"]
        figures[FIGURES.index("entropy"), : shape.alerts * shape.heads] = np.nan
        index = tuple(HeadIndex(name, i, 0, shape.heads, "softmax") for i, name in enumerate(names))
        layers = tuple((name, i) for i, name in enumerate(names))
        sigmas = torch.from_numpy(rng.random((shape.layers, 4), dtype=np.float32))
        updates = torch.from_numpy(rng.random((shape.layers, len(UPDATE_FIGURES)), dtype=np.float32))
        return Harvest(step, index, torch.from_numpy(figures), layers, sigmas, {}), updates

    return at


class Fed(Recorder):
    """Has read what it is given."""

    given: Harvest
    is_empty = False

    def harvest(self) -> Harvest:
        return self.given


class FedMonitor(EntropyMonitor):
    """Its figures are given, not read."""

    updates: Tensor

    def _updates(self, _: Harvest) -> Tensor:
        return self.updates


class Attention(nn.Module):
    """Something to watch, which never runs."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x)


@dataclass
class Spent:
    """Median milliseconds of the training thread, and the records that it gave."""

    in_all: float
    measured: float
    records: list[Record]

    def __str__(self) -> str:
        return f"{self.in_all:.3f} ({self.measured:.3f})"


def training_thread(shape: Shape, measurements: int, cold: bool) -> Spent:
    """Of so many measurements by a monitor that is given their figures."""
    keeper, figures = Keeper(), harvests(shape)
    in_all, alone, spent = [], [], 0.0
    # Steps that all take a second: the budget is reckoned with, and always kept.
    steps = itertools.count()
    steady = partial(Plan, clock=lambda: float(next(steps)))
    with tempfile.TemporaryDirectory() as folder, mock.patch("entropy_monitor.monitor.Plan", steady):
        monitor = FedMonitor(Attention(), run_dir=f"{folder}/run", loggers=[keeper])
        recorder = monitor._recorder
        recorder.__class__ = Fed
        assert isinstance(recorder, Fed)
        recorder.given, monitor.updates = figures(0)
        while len(alone) < measurements:
            if cold:
                _CACHE.fill(len(alone))
            start = time.thread_time()
            report = monitor.step(2.0)
            took = time.thread_time() - start
            spent += took
            if report.measured:
                in_all.append(spent)
                alone.append(took)
                spent = 0.0
                recorder.given, monitor.updates = figures(report.step + 1)
        assert len(monitor.open_alerts) == shape.alerts
        monitor.close()
        assert not monitor.faults, monitor.faults
        assert not any(monitor.dropped.values()), monitor.dropped
    settled = len(alone) // 4
    return Spent(*(1e3 * statistics.median(x[settled:]) for x in (in_all, alone)), keeper.records)


def sink_thread(sink: Sink, records: list[Record], rounds: int) -> float:
    """Median over rounds of the mean CPU milliseconds that a record takes in `log`."""
    sink.open(RunInfo({"class": "Model", "parameters": {"w": [1]}}, {"every": EVERY}, {"python": "3"}))
    for record in records:  # the first meets what is new
        sink.log(record)
    times = []
    for n in range(1, rounds + 1):
        later = [replace(record, step=record.step + n * EVERY * len(records)) for record in records]
        start = time.thread_time()
        for record in later:
            sink.log(record)
        times.append((time.thread_time() - start) / len(later))
    sink.close()
    return 1e3 * statistics.median(times)


def sinks(folder: str) -> dict[str, Sink]:
    """One of each, writing below a folder."""
    return {
        "store": RunWriter(f"{folder}/run"),
        "TensorBoard": TensorBoardLogger(f"{folder}/tb"),
        "W&B": WandbLogger(dir=folder, mode="offline"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100, help="measurements on the training thread")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of 20 records for each sink")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to see that it runs")
    options = parser.parse_args()
    steps, rounds = (8, 1) if options.smoke else (options.steps, options.rounds)
    torch.set_num_threads(1)
    print(f"entropy-monitor {entropy_monitor.__version__}; {machine('cpu')}. ms per measurement, medians;")
    print("training thread: all ten steps (the measured step alone)")
    for shape in SMOKE if options.smoke else SHAPES:
        cold, warm = (training_thread(shape, steps, is_cold) for is_cold in (True, False))
        records = warm.records
        print(f"{shape!s:40} training thread {warm}, cold {cold}", end="", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            for name, sink in sinks(folder).items():
                print(f"   {name} {sink_thread(sink, records[-20:], rounds):7.3f}", end="", flush=True)
            files = (Path(folder) / "run").glob("heads-*.arrows")
            written = (rounds + 1) * len(records[-20:]) * shape.layers * shape.heads
            size = sum(file.stat().st_size for file in files) / written
        print(f"   store: {size:.0f} MB per 10⁶ rows of heads")


if __name__ == "__main__":
    main()
