"""Run directories with the numbers of a made-up run."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from entropy_monitor.records import HEADS, LAYERS, SCALARS, Alert, AlertEvent, Columns, Record, RunInfo, Table
from entropy_monitor.store import RunWriter
from tests.run_factory import FakeRun


def as_alert(row: dict[str, Any]) -> Alert:
    """A row of a frame of alerts as an alert."""
    closed = None if pd.isna(row["closed"]) else int(row["closed"])
    return Alert(**{**row, "heads": tuple(row["heads"]), "closed": closed})


def written(run: FakeRun, path: Path, *, close: bool = True, flush_every: int = 3) -> Path:
    """The run's tables and alerts as `RunWriter` keeps them, step by step."""
    writer = RunWriter(path, flush_every=flush_every, flush_seconds=1e9)
    versions = run.info.get("versions", {})
    writer.open(RunInfo(run.info.get("model", {}), {"every": 10}, versions, plan=run.plan))
    steps = sorted({*run.heads["step"], *run.layers["step"]})
    bounds = [-np.inf, *steps[:-1], np.inf] if steps else [-np.inf, np.inf]
    for step, (after, until) in zip(steps or [0], pairwise(bounds), strict=True):
        given = run.scalars["step"].between(after, until, inclusive="right")
        heads, layers = (table[table["step"] == step] for table in (run.heads, run.layers))
        tables = ((HEADS, heads), (LAYERS, layers), (SCALARS, run.scalars[given]))
        writer.log(Record(step, *(_columns(table, rows) for table, rows in tables)))
    for row in run.alerts.to_dict("records"):
        alert = as_alert(row)
        writer.alert(AlertEvent("opened", alert.opened, alert))
    if close:
        writer.close()
    else:
        writer.flush()
    return path


def _columns(table: Table, rows: pd.DataFrame) -> Columns:
    return {
        column.name: rows[column.name].tolist()
        if column.dtype == "str"
        else rows[column.name].to_numpy(column.dtype)
        for column in table.columns
    }
