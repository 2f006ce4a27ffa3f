"""Records for the analyzer's tests: synthetic ones, and the recorded digits runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from entropy_monitor.analyzer import Analyzer
from entropy_monitor.records import HEADS, LAYERS, AlertEvent, Columns, Record

MAX_ENTROPY = math.log(16)
DIGITS = Path(__file__).parent / "data" / "digits.npz"
DIGITS_LAYERS, DIGITS_HEADS = 6, 4


def keys(layers: int, heads: int, calls: int = 1) -> list[tuple[str, int, int]]:
    """The heads (layer, call, head) of a regular model."""
    return [(f"blocks.{i}.attn", c, h) for i in range(layers) for c in range(calls) for h in range(heads)]


def record(
    step: int,
    heads: Sequence[tuple[str, int, int]],
    *,
    share: Any = 0.9,
    loss: float | Iterable[float] | None = None,
    layers: Mapping[str, Mapping[str, float]] | None = None,
    **columns: Any,
) -> Record:
    """A record of some heads; columns are numbers or arrays, what is not given is sound or not known."""
    rows = len(heads)
    table: dict[str, Any] = {
        "step": np.full(rows, step),
        "layer": [layer for layer, _, _ in heads],
        "layer_index": np.zeros(rows, dtype=np.int64),
        "call": np.array([call for _, call, _ in heads], dtype=np.int64),
        "head": np.array([head for _, _, head in heads], dtype=np.int64),
        "attention": ["softmax"] * rows,
        "rows_read": np.full(rows, 512),
    }
    given = {"max_entropy": MAX_ENTROPY, "max_logit": 2.0, "entropy_se": 0.0} | columns
    given.setdefault("entropy", np.asarray(share) * given["max_entropy"])
    for column in HEADS.columns:
        if column.name in given:
            table[column.name] = np.broadcast_to(
                np.asarray(given[column.name], dtype=column.dtype), rows
            ).copy()
        elif column.name not in table:
            table[column.name] = np.full(rows, np.nan, dtype=np.float32)
    losses = [] if loss is None else np.atleast_1d(np.asarray(loss, dtype=np.float64)).tolist()
    scalars: Columns = {
        "step": np.full(len(losses), step),
        "name": ["loss"] * len(losses),
        "value": np.array(losses, dtype=np.float64),
    }
    return Record(step, table, _layers(step, layers or {}), scalars)


def _layers(step: int, rows: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for column in LAYERS.columns:
        if column.name == "layer":
            table["layer"] = list(rows)
        elif column.dtype == "int64":
            table[column.name] = np.full(len(rows), step)
        else:
            table[column.name] = np.array(
                [row.get(column.name, np.nan) for row in rows.values()], dtype=np.float32
            )
    return table


def play(analyzer: Analyzer, records: Iterable[Record]) -> list[AlertEvent]:
    """All events that some records give."""
    return [event for each in records for event in analyzer.update(each)]


def brief(events: Iterable[AlertEvent]) -> list[tuple[str, int, str]]:
    """Events as (event, step, kind)."""
    return [(event.event, event.step, event.alert.kind) for event in events]


def fall(
    shares: Sequence[Any] | np.ndarray[Any, Any], heads: int = 4, every: int = 10, **columns: Any
) -> list[Record]:
    """One layer whose heads all follow `shares`."""
    return [record(every * i, keys(1, heads), share=share, **columns) for i, share in enumerate(shares)]


def digits(name: str) -> list[Record]:
    """A recorded run of `data/digits.npz`: 6 layers, 4 heads, measured every 10 of 500 steps."""
    with np.load(DIGITS) as data:
        run = {
            column: data[f"{name}/{column}"].astype(np.float64)
            for column in ("entropy", "max_logit", "sigma_qk", "loss")
        }
    heads = keys(DIGITS_LAYERS, DIGITS_HEADS)
    per_head = ("entropy", "max_logit", "sigma_qk")
    return [
        record(
            10 * i,
            heads,
            loss=run["loss"][max(0, 10 * i - 9) : 10 * i + 1],
            **{column: run[column][i] for column in per_head},
        )
        for i in range(len(run["entropy"]))
    ]
