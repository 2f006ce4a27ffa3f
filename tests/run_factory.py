"""Runs made of numbers: what `load_run` returns, without a training behind it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from entropy_monitor.records import HEADS, LAYERS, SCALARS, Table

ALERT_COLUMNS = (
    "id", "kind", "severity", "layer", "heads", "opened", "updated", "closed", "title", "message",
    "advice", "evidence",
)  # fmt: skip
MAXIMUM = math.log(16)


def frame(table: Table, rows: Sequence[Mapping[str, Any]] = ()) -> pd.DataFrame:
    """Rows as a frame with the table's columns and dtypes; what a row leaves out is null."""
    columns = {}
    for column in table.columns:
        values = [row.get(column.name, np.nan) for row in rows]
        dtype = "object" if column.dtype == "str" else column.dtype
        columns[column.name] = pd.Series(values, dtype=dtype)
    return pd.DataFrame(columns)


def alert(**changes: Any) -> dict[str, Any]:
    """A severe collapse of layer `b.0.attn`, changed where asked."""
    return {
        "id": "entropy_collapse-0000",
        "kind": "entropy_collapse",
        "severity": "severe",
        "layer": "b.0.attn",
        "heads": [0, 1],
        "opened": 30,
        "updated": 60,
        "closed": None,
        "title": "Attention of b.0.attn is collapsing",
        "message": "Entropy has fallen to 3 % of its maximum.",
        "advice": "Go back to a checkpoint from before step 30 and halve the learning rate.",
        "evidence": {
            "entropy": 0.08,
            "entropy_share": 0.03,
            "max_logit": 212.0,
            "worst_head": 1,
            "call": 0,
            "map": [[0.9, 0.1], [0.2, 0.8]],
        },
        **changes,
    }


def alert_frame(alerts: Sequence[Mapping[str, Any]] = ()) -> pd.DataFrame:
    """Alerts as `load_run` gives them."""
    made = pd.DataFrame([dict(row) for row in alerts], columns=list(ALERT_COLUMNS))
    made["closed"] = made["closed"].astype("Int64")
    return made


@dataclass(frozen=True)
class FakeRun:
    """The attributes of a run that figures and reports read."""

    name: str = "run"
    path: Path = Path("runs/run")
    heads: pd.DataFrame = field(default_factory=lambda: frame(HEADS))
    layers: pd.DataFrame = field(default_factory=lambda: frame(LAYERS))
    scalars: pd.DataFrame = field(default_factory=lambda: frame(SCALARS))
    alerts: pd.DataFrame = field(default_factory=alert_frame)
    info: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def but(self, **changes: Any) -> FakeRun:
        """The same run with other attributes."""
        return replace(self, **changes)


def make_run(
    name: str = "sound", *, collapsing: bool = False, layers: int = 3, heads: int = 2, steps: int = 12
) -> FakeRun:
    """A run measured every 10 steps, its loss recorded at every step.

    Entropy share of layer l, head h at record t: 0.9 - 0.01·(l + h), at least 0.05, when sound; that times
    0.5^(t / (1 + l)) when collapsing. σ_QK starts at 1 and stays, or doubles with every record.
    """
    head_rows, layer_rows = [], []
    for record in range(steps):
        for index in range(layers):
            where = {"step": 10 * record, "layer": f"b.{index}.attn", "layer_index": index}
            sigma = 2.0**record if collapsing else 1.0
            layer_rows.append({**where, "sigma_q": sigma, "sigma_v": 1.5, "grad_linf": 0.01})
            for head in range(heads):
                share = max(0.9 - 0.01 * (index + head), 0.05)
                if collapsing:
                    share *= 0.5 ** (record / (1 + index))
                entropy = share * MAXIMUM
                head_rows.append(
                    {
                        **where,
                        "call": 0,
                        "head": head,
                        "attention": "softmax",
                        "entropy": entropy,
                        "entropy_se": 0.01,
                        "rows_read": 64,
                        "max_entropy": MAXIMUM,
                        "max_logit": 3.0 * sigma,
                        "floor_row": 0.8 * entropy,
                        "floor_activation": 0.5 * entropy,
                        "floor_paper": MAXIMUM,
                        "sigma_q": sigma,
                        "sigma_k": 1.0,
                        "sigma_qk": sigma,
                    }
                )
    losses = [{"step": step, "name": "loss", "value": 2.0 * 0.99**step} for step in range(10 * steps)]
    return FakeRun(
        name=name,
        path=Path("runs") / name,
        heads=frame(HEADS, head_rows),
        layers=frame(LAYERS, layer_rows),
        scalars=frame(SCALARS, losses),
        alerts=alert_frame([alert()] if collapsing else []),
        info={"model": {"class": "ViT", "parameters": {"w": [4, 4]}}, "versions": {"torch": "2.4"}},
        plan={"b.0.attn": {"source": "sdpa", "heads": 2}},
    )


NORMS = ("floor_activation", "floor_weights", "floor_paper", "sigma_q", "sigma_k", "sigma_qk")


def read_seldom(run: FakeRun, *, every: int = 4, suspects: Sequence[str] = ()) -> FakeRun:
    """The run with what rests on norms known in one of `every` records only, and of `suspects` in all."""

    def thinned(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
        unread = (table["step"] // 10 % every != 0) & ~table["layer"].isin(suspects)
        table = table.copy()
        table.loc[unread, list(columns)] = np.nan
        return table

    of_layers = [column.name for column in LAYERS.columns if column.nullable]
    return run.but(heads=thinned(run.heads, NORMS), layers=thinned(run.layers, of_layers))
