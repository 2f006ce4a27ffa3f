"""What a measured step costs once its figures are there: analysing them, and handing them to the sinks.

`python benchmarks/pipeline.py`. Prints, for 10², 10³ and 10⁴ heads, milliseconds of a measured step: on the
training thread (from the harvest to the events; with warm caches, and with caches that hold nothing of it,
which is worse than a training step leaves them), and on the thread of each sink (what a sink does in Python
holds the interpreter lock). Medians of CPU time, which others on the machine disturb less than the clock.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from models import machine
from torch import Tensor

import entropy_monitor
from entropy_monitor.alerting import Alerting
from entropy_monitor.analyzer import Analyzer
from entropy_monitor.dashboards import TensorBoardLogger, WandbLogger
from entropy_monitor.delivery import Delivery
from entropy_monitor.guard import Guard
from entropy_monitor.hooks import FIGURES, Harvest
from entropy_monitor.hooks.recorder import HeadIndex
from entropy_monitor.hooks.weights import UPDATE_FIGURES
from entropy_monitor.pipeline import Pipeline
from entropy_monitor.records import Record, RunInfo, Sink
from entropy_monitor.store import RunWriter

EVERY = 10  # steps between measurements: so many losses come with a record
_CACHE = np.zeros(1 << 23)  # 64 MiB, more than the caches of a core
_TYPICAL = {"entropy": 4.0, "max_entropy": 6.0, "rows_read": 1024.0, "max_logit": 5.0, "floor_row": 2.0}
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


def training_thread(shape: Shape, steps: int, cold: bool) -> tuple[float, list[Record]]:
    """Median milliseconds of a measured step, and the records that it gave."""
    guard, keeper, figures = Guard(strict=True), Keeper(), harvests(shape)
    alerting = Alerting(Analyzer(), guard, None)
    pipeline = Pipeline(alerting, Delivery([(keeper, steps + shape.alerts)]), guard)
    times = []
    for n in range(steps):
        now = EVERY * n
        for step in range(now - EVERY + 1, now + 1):
            pipeline.keep(step, 2.0, None)
        harvest, updates = figures(now)
        if cold:
            _CACHE.fill(n)
        start = time.thread_time()
        pipeline.send(now, harvest, updates)
        pipeline.receive()
        pipeline.take_events()
        times.append(time.thread_time() - start)
    assert len(alerting.open_alerts) == shape.alerts
    pipeline.close(10)
    return 1e3 * statistics.median(times[len(times) // 4 :]), keeper.records


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
    parser.add_argument("--steps", type=int, default=100, help="measured steps on the training thread")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of 20 records for each sink")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to see that it runs")
    options = parser.parse_args()
    steps, rounds = (8, 1) if options.smoke else (options.steps, options.rounds)
    torch.set_num_threads(1)
    print(f"entropy-monitor {entropy_monitor.__version__}; {machine('cpu')}. ms per measured step, medians")
    for shape in SMOKE if options.smoke else SHAPES:
        cold, _ = training_thread(shape, steps, cold=True)
        warm, records = training_thread(shape, steps, cold=False)
        print(f"{shape!s:40} training thread {warm:.3f} (cold {cold:.3f})", end="", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            for name, sink in sinks(folder).items():
                print(f"   {name} {sink_thread(sink, records[-20:], rounds):7.3f}", end="", flush=True)
            files = (Path(folder) / "run").glob("heads-*.arrows")
            written = (rounds + 1) * len(records[-20:]) * shape.layers * shape.heads
            size = sum(file.stat().st_size for file in files) / written
        print(f"   store: {size:.0f} MB per 10⁶ rows of heads")


if __name__ == "__main__":
    main()
