"""What loggers write of models of any depth: names, bytes and time a record.

`python benchmarks/loggers.py`. Prints, for a small model and for deep ones, how many scalars TensorBoard and
W&B are given names for, bytes on disk a record (pictures, histograms and tables included, W&B offline), and
milliseconds a record on the logger's thread, median and largest. All figures are there in each record, which
is so in one measurement of four. `--max-layers` is the loggers' option; 10000 shows them without a bound.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from models import machine

from entropy_monitor.dashboards import TensorBoardLogger, WandbLogger
from entropy_monitor.records import HEADS, LAYERS, Columns, Record, RunInfo, Table
from entropy_monitor.trackers.layer_choice import MAX_LAYERS
from entropy_monitor.trackers.named_metrics import NamedMetrics

SHAPES = ((12, 12), (48, 16), (400, 32))
_EVERY = 10  # steps between records


def record(step: int, layers: int, heads: int) -> Record:
    """A record of which every figure is known."""
    rng = np.random.default_rng(step)
    names = [f"model.layers.{index}.self_attn" for index in range(layers)]
    of_heads = {
        "step": np.full(layers * heads, step),
        "layer": [name for name in names for _ in range(heads)],
        "layer_index": np.repeat(np.arange(layers), heads),
        "call": np.zeros(layers * heads, dtype=np.int64),
        "head": np.tile(np.arange(heads), layers),
        "attention": ["softmax"] * (layers * heads),
        "rows_read": np.full(layers * heads, 64),
        "max_entropy": np.full(layers * heads, 6.0, dtype=np.float32),
    }
    of_layers = {"step": np.full(layers, step), "layer": names, "layer_index": np.arange(layers)}
    return Record(step, _filled(HEADS, of_heads, rng), _filled(LAYERS, of_layers, rng))


def _filled(table: Table, given: Columns, rng: np.random.Generator) -> Columns:
    rows = len(given["step"])
    random = {c.name: rng.uniform(0.5, 5.0, rows).astype(np.float32) for c in table.columns}
    return {name: given.get(name, random[name]) for name in table.names}


def measure(which: str, layers: int, heads: int, records: int, max_layers: int) -> str:
    """A line about one logger and one shape."""
    with tempfile.TemporaryDirectory() as folder:
        logger: TensorBoardLogger | WandbLogger = (
            TensorBoardLogger(folder, max_layers=max_layers)
            if which == "TensorBoard"
            else WandbLogger(dir=folder, mode="offline", max_layers=max_layers)
        )
        logger.open(RunInfo({}, {}, {}))
        times = []
        for number in range(records):
            one = record(_EVERY * number, layers, heads)
            start = time.perf_counter()
            logger.log(one)
            times.append(1e3 * (time.perf_counter() - start))
        logger.close()
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    names = len(NamedMetrics(max_layers=max_layers).take(record(0, layers, heads)).values)
    cost = f"{size / records / 1e3:6.1f} kB   {statistics.median(times):6.1f} ms, at most {max(times):5.0f}"
    return f"{layers:3} layers × {heads:2} heads   {which:11}   {names:5,} scalars   {cost}"


def main() -> None:
    """Print a line for each logger and shape."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--records", type=int, default=200)
    parser.add_argument("--max-layers", type=int, default=MAX_LAYERS)
    options = parser.parse_args()
    os.environ.setdefault("WANDB_SILENT", "true")
    print(f"{machine('cpu')}; {options.records} records, max_layers={options.max_layers}")
    for layers, heads in SHAPES:
        for which in ("TensorBoard", "W&B"):
            print(measure(which, layers, heads, options.records, options.max_layers), flush=True)


if __name__ == "__main__":
    main()
