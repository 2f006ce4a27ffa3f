"""Rows of the tables that W&B shows: heads and layers, and the alerts of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from entropy_monitor.records import HEADS, Alert, Column, Columns
from entropy_monitor.trackers.aggregates import (
    HEAD_METRICS,
    LAYER_METRICS,
    LayerAggregate,
    entropy_share,
)

MOST_ROWS = 2_000
"""Rows of a table; of more heads, those whose entropy share is least are kept. W&B takes 0.2 ms to make a
row, on a thread that shares the interpreter with the training's, and shows 10,000 at most."""

ALERT_COLUMNS = (
    "opened",
    "closed",
    "severity",
    "kind",
    "layer",
    "heads",
    "title",
    "message",
    "advice",
)

Rows = tuple[list[str], list[list[Any]]]


def head_rows(heads: Columns) -> Rows:
    """Columns and rows of `heads`, null as None, at most `MOST_ROWS` rows."""
    keep = np.arange(len(heads["head"]))
    if len(keep) > MOST_ROWS:
        # NaN sorts last, yet a reading that is not finite is what one looks for first.
        share = np.where(np.isfinite(heads["entropy"]), entropy_share(heads), -1.0)
        keep = np.sort(np.argsort(share, kind="stable")[:MOST_ROWS])
    columns = [_plain(column, heads, keep) for column in HEADS.columns]
    return list(HEADS.names), [list(row) for row in zip(*columns, strict=True)]


def layer_rows(layers: Sequence[LayerAggregate]) -> Rows:
    """Columns and rows of attention calls with their metrics; None where one is not known."""
    metrics = (*HEAD_METRICS, *LAYER_METRICS)
    rows = [
        [layer.index, layer.layer, layer.call, layer.heads, *(layer.values.get(m) for m in metrics)]
        for layer in layers[:MOST_ROWS]
    ]
    return ["layer_index", "layer", "call", "heads", *metrics], rows


def alert_rows(alerts: Sequence[Alert]) -> Rows:
    """Columns and rows of alerts; `closed` is None while an alert is open."""
    rows = [
        [
            ", ".join(map(str, alert.heads)) if name == "heads" else getattr(alert, name)
            for name in ALERT_COLUMNS
        ]
        for alert in alerts
    ]
    return list(ALERT_COLUMNS), rows


def _plain(column: Column, heads: Columns, keep: Any) -> list[Any]:
    if column.dtype == "str":
        return [str(heads[column.name][row]) for row in keep]
    values: list[Any] = np.asarray(heads[column.name])[keep].tolist()
    if not column.nullable:
        return values
    return [None if np.isnan(value) else value for value in values]
