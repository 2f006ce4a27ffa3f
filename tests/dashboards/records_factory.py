"""Records, alerts and runs made up for the dashboards' tests; values follow from step, layer and head."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from entropy_monitor.records import (
    HEADS,
    LAYERS,
    SCALARS,
    Alert,
    AlertEvent,
    Columns,
    EventName,
    Record,
    RunInfo,
    Severity,
    Table,
)

TOKENS = 16


def columns(table: Table, rows: list[dict[str, Any]]) -> Columns:
    """Rows as columns; a nullable column that a row leaves out is null."""
    made: Columns = {}
    for column in table.columns:
        values = [row.get(column.name, math.nan) if column.nullable else row[column.name] for row in rows]
        made[column.name] = values if column.dtype == "str" else np.array(values, dtype=column.dtype)
    return made


def head_row(step: int, index: int, head: int, **changes: Any) -> dict[str, Any]:
    entropy = 2.0 - 0.25 * index - 0.125 * head + step / 1000
    return {
        "step": step,
        "layer": f"blocks.{index}.attn",
        "layer_index": index,
        "call": 0,
        "head": head,
        "attention": "softmax",
        "entropy": entropy,
        "entropy_se": 0.0,
        "rows_read": 32,
        "max_entropy": math.log(TOKENS),
        "max_logit": 1.0 + index + head,
        "floor_row": entropy - 0.5,
        "sigma_qk": 3.0 + head,
    } | changes


def layer_row(step: int, layer: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "layer": f"blocks.{layer}.attn",
        "layer_index": layer,
        "sigma_q": 5.0 + layer,
        "sigma_k": 6.0 + layer,
        "grad_linf": 0.5,
    } | changes


def record(step: int, layers: int = 2, heads: int = 4, **changes: Any) -> Record:
    """A step's record; `changes` go into every row of `heads`."""
    return Record(
        step,
        columns(HEADS, [head_row(step, la, h, **changes) for la in range(layers) for h in range(heads)]),
        columns(LAYERS, [layer_row(step, la) for la in range(layers)]),
        columns(SCALARS, [{"step": step, "name": "loss", "value": 4.0 - step / 100}]),
    )


def bare(step: int, rows: list[dict[str, Any]]) -> Record:
    """A record of `heads` rows only."""
    return Record(step, columns(HEADS, rows))


def seldom(steps: int = 6) -> list[Record]:
    """Records of two layers of σ_QK 3 and 9, the first known in all, the second in one of four."""
    return [
        bare(s, [head_row(s, 0, 0, sigma_qk=3.0), head_row(s, 1, 0, sigma_qk=math.nan if s % 4 else 9.0)])
        for s in range(steps)
    ]


def event(
    name: EventName = "opened",
    step: int = 10,
    alert_id: str = "a1",
    severity: Severity = "warning",
    layer: str = "blocks.0.attn",
    **changes: Any,
) -> AlertEvent:
    fields: dict[str, Any] = {
        "id": alert_id,
        "kind": "entropy_collapse",
        "severity": severity,
        "layer": layer,
        "heads": (0, 2),
        "opened": 10,
        "updated": step,
        "closed": step if name == "closed" else None,
        "title": f"Entropy collapse in {layer}",
        "message": "Heads 0 and 2 fell to 4 % of their maximum.",
        "advice": "Lower the learning rate.",
        "evidence": {},
    } | changes
    return AlertEvent(name, step, Alert(**fields))


def info(run_dir: str | None = None, session: int = 0, rank: int = 0) -> RunInfo:
    return RunInfo(
        {"class": "Model", "parameters": {"w": [2, 2]}},
        {"every": 10},
        {"entropy_monitor": "0"},
        run_dir=run_dir,
        session=session,
        rank=rank,
    )
