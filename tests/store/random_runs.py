"""Runs made up at random: layers that come and go, ranks, sessions that overlap, readings that break."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from entropy_monitor.records import HEADS, LAYERS, Columns, Record, Table
from entropy_monitor.store import RunWriter
from tests.store.samples import event, info

NAMES = ("a.0", "b,1\nnext", "Schicht-ü.注意", "z" * 300, "0")
"""In order of execution; with a comma, a line's end, other scripts, very long."""


@dataclass(frozen=True)
class Shape:
    """What records hold.

    Attributes:
        layers: how many.
        heads: of a layer.
        calls: of a layer.
        changing: part of the records in which layers are missing and rows are shuffled.
        broken: part of the readings that are null or not finite.
    """

    layers: int = 3
    heads: int = 2
    calls: int = 1
    changing: float = 0.2
    broken: float = 0.1


def record(g: np.random.Generator, step: int, shape: Shape, heads: range | None = None) -> Record:
    """A record at random. Weights depend on step and place alone: all ranks hold the same.

    Args:
        g: draws.
        step: of the record.
        shape: of it.
        heads: which of them; by default all.
    """
    odd = g.random() < shape.changing
    present = [i for i in range(shape.layers) if not odd or g.random() < 0.7] or [0]
    calls = range(shape.calls)
    rows = [(i, call, h) for i in present for call in calls for h in (heads or range(shape.heads))]
    if odd:
        g.shuffle(rows)
    scalars: Columns = {
        "step": np.array([step, step]),
        "name": ["loss", "η"],
        "value": g.standard_normal(2),
    }
    return Record(
        step,
        _columns(g, HEADS, step, rows, shape.broken),
        _columns(g, LAYERS, step, [(i, 0, -1) for i in present], shape.broken),
        scalars,
    )


def _columns(
    g: np.random.Generator, table: Table, step: int, rows: list[tuple[int, int, int]], broken: float
) -> Columns:
    made: Columns = {}
    for column in table.columns:
        if column.merge == "same":
            made[column.name] = np.array([_weight(step, column.name, row) for row in rows], np.float32)
        elif column.dtype == "float32":
            made[column.name] = g.uniform(0.5, 3, len(rows)).astype(np.float32)
        if column.dtype == "float32":
            values: Any = made[column.name]
            values[g.random(len(rows)) < broken] = np.nan
            if column.merge != "same":
                values[g.random(len(rows)) < broken / 4] = np.inf
    made["step"] = np.full(len(rows), step)
    made["layer"] = [NAMES[layer] for layer, _, _ in rows]
    made["layer_index"] = np.array([layer for layer, _, _ in rows])
    if table is HEADS:
        made["call"] = np.array([call for _, call, _ in rows])
        made["head"] = np.array([head for _, _, head in rows])
        made["attention"] = ["softmax"] * len(rows)
        made["rows_read"] = g.integers(1, 64, len(rows))
    return {name: made[name] for name in table.names}


def _weight(step: int, name: str, row: tuple[int, int, int]) -> float:
    return 1 + zlib.crc32(repr((step, name, row)).encode()) / 2**31


def session(
    run_dir: Path,
    g: np.random.Generator,
    steps: range | tuple[int, ...],
    shape: Shape = Shape(),
    *,
    rank: int = 0,
    heads: range | None = None,
    plan: dict[str, Any] | None = None,
    flush_every: int = 4,
) -> Iterator[RunWriter]:
    """One rank's session, a record at each turn; the files are ended with the last one."""
    writer = RunWriter(run_dir, rank=rank, flush_every=flush_every, flush_seconds=1e9)
    writer.open(info(plan=plan or {}))
    yield writer
    for step in steps:
        writer.log(record(g, step, shape, heads))
        if g.random() < 0.05:
            writer.alert(event(step, id_=f"a{step}"))
        yield writer
    writer.close()
    yield writer


def write(*args: Any, close: bool = True, **options: Any) -> None:
    """A whole session; one that is not closed ends as that of a process that is killed."""
    for turn, _ in enumerate(session(*args, **options)):
        if not close and turn == len(args[2]):
            break
