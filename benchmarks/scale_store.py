"""Long runs without training them: what the store takes to write, to keep and to query."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from models import Clock, timed

import entropy_monitor as em
from entropy_monitor.records import HEADS, LAYERS, Columns, Record, RunInfo
from entropy_monitor.store import RunWriter, export

EVERY = 10  # steps between records
_DRIFT = 0.01  # relative change of a figure from record to record
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Depth:
    """The model of a run that is simulated: its layers, and heads in each."""

    layers: int = 12
    heads: int = 8

    @property
    def rows(self) -> int:
        """Head-rows in a record."""
        return self.layers * self.heads

    @property
    def names(self) -> list[str]:
        """The layers' names."""
        return [f"transformer.blocks.{i}.attn" for i in range(self.layers)]


@dataclass(frozen=True)
class Written:
    """A run that was written: its measured steps, rows, seconds and bytes."""

    steps: int
    head_rows: int
    seconds: float
    bytes_: int

    @property
    def bytes_per_million(self) -> float:
        """Bytes on disk per 10⁶ head-rows, all tables counted."""
        return self.bytes_ * 1e6 / self.head_rows


def write_run(folder: Path, steps: int, clock: Clock, depth: Depth = Depth()) -> Written:
    """Write a run of `steps` training steps, a record every 10, of figures that drift, each on its own."""
    writer = RunWriter(folder)
    writer.open(RunInfo(model={"class": "Simulated", "parameters": {}}, options={}, versions={}))
    seconds = sum(timed(partial(writer.log, record), clock) for record in records(steps, depth))
    seconds += timed(writer.close, clock)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Written(steps, len(range(0, steps, EVERY)) * depth.rows, seconds, size)


def records(steps: int, depth: Depth) -> Iterator[Record]:
    """The records of such a run."""
    generator = np.random.default_rng(0)
    figures = generator.uniform(0.5, 5.0, (len(HEADS.columns), depth.rows)).astype(np.float32)
    whole = generator.uniform(0.5, 5.0, (len(LAYERS.columns), depth.layers)).astype(np.float32)
    names = depth.names
    of_heads = [name for name in names for _ in range(depth.heads)]
    for step in range(0, steps, EVERY):
        for table in (figures, whole):
            table *= 1 + _DRIFT * generator.standard_normal(table.shape, dtype=np.float32)
            np.clip(table, 1e-3, 100.0, out=table)
        yield Record(step, _heads(step, of_heads, figures, depth), _layers(step, names, whole), _loss(step))


def _heads(step: int, names: list[str], figures: np.ndarray, depth: Depth) -> Columns:
    rows = depth.rows
    places = {
        "step": np.full(rows, step),
        "layer": names,
        "layer_index": np.repeat(np.arange(depth.layers), depth.heads),
        "call": np.zeros(rows, np.int64),
        "head": np.tile(np.arange(depth.heads), depth.layers),
        "attention": ["softmax"] * rows,
        "rows_read": np.full(rows, 128),
    }
    return {name: places.get(name, figures[i]) for i, name in enumerate(HEADS.names)}


def _layers(step: int, names: list[str], figures: np.ndarray) -> Columns:
    count = len(names)
    places = {"step": np.full(count, step), "layer": names, "layer_index": np.arange(count)}
    return {name: places.get(name, figures[i]) for i, name in enumerate(LAYERS.names)}


def _loss(step: int) -> Columns:
    steps = np.arange(step, step + EVERY)
    return {"step": steps, "name": ["loss"] * EVERY, "value": 1 / (1.0 + steps)}


_Answer = tuple[float, float, list[tuple[str, int, float]]]  # seconds to get ready, to query; what was found


@dataclass(frozen=True)
class Queried:
    """What a way of querying took: seconds to get ready and to answer, memory at most, and the answer."""

    ready: float
    query: float
    peak_mb: float  # over that of the process before
    answer: list[tuple[str, int, float]]


def query(folder: Path, way: str, clock: Clock) -> Queried | str:
    """The five heads of lowest mean entropy over the last tenth of a run; text that says why it cannot be.

    Args:
        folder: of the run.
        way: `export`, which answers nothing, `duckdb` or `pandas`; each in a process of its own.
    """
    if way == "duckdb" and find_spec("duckdb") is None:
        return "duckdb is not installed"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measured, way, folder, clock).result()


def _measured(way: str, folder: Path, clock: Clock) -> Queried:
    before = _memory("VmRSS")
    ready, seconds, answer = _WAYS[way](folder, clock)
    return Queried(ready, seconds, _memory("VmHWM") - before, answer)


def _memory(which: str) -> float:
    """Of this process, in MB: `VmRSS` now, `VmHWM` at most."""
    if not _STATUS.exists():
        return float("nan")
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{which}:"))
    return int(line.split()[1]) / 1024


def _export(folder: Path, clock: Clock) -> _Answer:
    start = clock()
    export(folder, folder / "parquet")
    return clock() - start, 0.0, []


def _duckdb(folder: Path, clock: Clock) -> _Answer:
    start = clock()
    import duckdb

    connection = duckdb.connect()
    connection.execute(
        f"create view heads as select * from read_parquet('{folder / 'parquet' / 'heads.parquet'}')"
    )
    ready = clock() - start
    start = clock()
    found = connection.execute(
        "select layer, head, avg(entropy::double) as mean from heads "
        "where step >= 0.9 * (select max(step) from heads) group by layer, head order by mean limit 5"
    ).fetchall()
    return ready, clock() - start, found


def _pandas(folder: Path, clock: Clock) -> _Answer:
    start = clock()
    heads = em.load_run(folder).heads
    ready = clock() - start
    start = clock()
    late = heads[heads["step"] >= 0.9 * heads["step"].max()]
    means = late["entropy"].astype("float64").groupby([late["layer"], late["head"]]).mean()
    found = [(str(layer), int(head), float(mean)) for (layer, head), mean in means.nsmallest(5).items()]
    return ready, clock() - start, found


_WAYS: dict[str, Callable[[Path, Clock], _Answer]] = {"export": _export, "duckdb": _duckdb, "pandas": _pandas}
