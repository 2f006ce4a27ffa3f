"""Long runs without training them: what the store takes to write, to keep and to query."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
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

LAYER_COUNT, HEAD_COUNT = 12, 8  # of the run that is simulated: 96 head-rows a record
EVERY = 10  # steps between records
ROWS_PER_RECORD = LAYER_COUNT * HEAD_COUNT
_DRIFT = 0.01  # relative change of a figure from record to record
_STATUS = Path("/proc/self/status")


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


def write_run(folder: Path, steps: int, clock: Clock) -> Written:
    """Write a run of `steps` training steps, a record every 10, of figures that drift, each on its own."""
    generator = np.random.default_rng(0)
    names = [f"transformer.blocks.{i}.attn" for i in range(LAYER_COUNT)]
    figures = generator.uniform(0.5, 5.0, (len(HEADS.columns), ROWS_PER_RECORD)).astype(np.float32)
    whole = generator.uniform(0.5, 5.0, (len(LAYERS.columns), LAYER_COUNT)).astype(np.float32)
    writer = RunWriter(folder)
    writer.open(RunInfo(model={"class": "Simulated", "parameters": {}}, options={}, versions={}))
    records = range(0, steps, EVERY)
    seconds = 0.0
    for step in records:
        for table in (figures, whole):
            table *= 1 + _DRIFT * generator.standard_normal(table.shape, dtype=np.float32)
            np.clip(table, 1e-3, 100.0, out=table)
        record = Record(step, _heads(step, names, figures), _layers(step, names, whole), _loss(step))
        seconds += timed(partial(writer.log, record), clock)
    seconds += timed(writer.close, clock)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Written(steps, len(records) * ROWS_PER_RECORD, seconds, size)


def _heads(step: int, names: list[str], figures: np.ndarray) -> Columns:
    places = {
        "step": np.full(ROWS_PER_RECORD, step),
        "layer": [name for name in names for _ in range(HEAD_COUNT)],
        "layer_index": np.repeat(np.arange(LAYER_COUNT), HEAD_COUNT),
        "call": np.zeros(ROWS_PER_RECORD, np.int64),
        "head": np.tile(np.arange(HEAD_COUNT), LAYER_COUNT),
        "attention": ["softmax"] * ROWS_PER_RECORD,
        "rows_read": np.full(ROWS_PER_RECORD, 128),
    }
    return {name: places.get(name, figures[i]) for i, name in enumerate(HEADS.names)}


def _layers(step: int, names: list[str], figures: np.ndarray) -> Columns:
    places = {"step": np.full(LAYER_COUNT, step), "layer": names, "layer_index": np.arange(LAYER_COUNT)}
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
