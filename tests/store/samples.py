"""Records, alerts and run infos to write, small and different at every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from entropy_monitor.records import (
    HEADS,
    LAYERS,
    Alert,
    AlertEvent,
    Columns,
    EventName,
    Record,
    RunInfo,
    Table,
)
from entropy_monitor.store import RunWriter

NAMES = ("encoder.0.attn", "Schicht-ü.注意.1")
MODEL = {"class": "Tiny", "parameters": {"q.weight": [4, 4], "q.bias": [4]}}


def info(**changes: Any) -> RunInfo:
    base: dict[str, Any] = {
        "model": MODEL,
        "options": {"every": 10},
        "versions": {"python": "3", "torch": "2", "entropy_monitor": "0"},
    }
    return RunInfo(**{**base, **changes})


def columns(
    table: Table, step: int, layers: tuple[str, ...] = NAMES, heads: int = 2, shift: float = 0.0
) -> Columns:
    """Numbers that are all different: the step, the row and the column tell what they must be.

    `shift` is added to what may differ from rank to rank; the weights are the same on all.
    """
    per_layer = heads if table is HEADS else 1
    count = per_layer * len(layers)
    row = np.arange(count)
    made: Columns = {}
    for place, column in enumerate(table.columns):
        if column.dtype == "float32":
            own = 0.0 if column.merge == "same" else shift
            made[column.name] = (step + row / 16 + place / 1024 + own).astype(np.float32)
        else:
            made[column.name] = np.zeros(count, dtype=np.int64)
    made["step"] = np.full(count, step)
    made["layer"] = [name for name in layers for _ in range(per_layer)]
    made["layer_index"] = row // per_layer
    if table is HEADS:
        made["head"] = row % per_layer
        made["attention"] = ["softmax"] * count
        made["rows_read"] = np.full(count, 32)
    return made


def record(step: int, loss: float | None = None, shift: float = 0.0, **changes: Any) -> Record:
    scalars: Columns = {
        "step": np.array([step]),
        "name": ["loss"],
        "value": np.array([1.0 / (step + 1) if loss is None else loss]),
    }
    return Record(
        step,
        columns(HEADS, step, shift=shift, **changes),
        columns(LAYERS, step, shift=shift, **changes),
        scalars,
    )


def event(
    step: int, name: EventName = "opened", id_: str = "a", opened: int | None = None, **changes: Any
) -> AlertEvent:
    fields: dict[str, Any] = {
        "id": id_,
        "kind": "entropy_collapse",
        "severity": "warning",
        "layer": NAMES[1],
        "heads": (0, 1),
        "opened": step if opened is None else opened,
        "updated": step,
        "closed": step if name == "closed" else None,
        "title": "Schicht-ü.注意.1 heads 0, 1",
        "message": 'collapsed\nsays "so"',
        "advice": "lower the rate",
        "evidence": {"share": 0.125, "sigma": float("inf"), "map": [[0.5, float("nan")], [1.0, 0.0]]},
    }
    return AlertEvent(name, step, Alert(**{**fields, **changes}))


def write_run(
    run_dir: Path,
    steps: range | tuple[int, ...],
    *,
    rank: int = 0,
    events: tuple[AlertEvent, ...] = (),
    shift: float = 0.0,
    close: bool = True,
) -> RunWriter:
    """One session with a batch for every record."""
    writer = RunWriter(run_dir, rank=rank, flush_seconds=0)
    writer.open(info())
    for step in steps:
        writer.log(record(step, shift=shift))
    for item in events:
        writer.alert(item)
    if close:
        writer.close()
    return writer


def contents(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run_dir.iterdir() if path.is_file()}
