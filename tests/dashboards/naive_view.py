"""The oracle of `RunView`: float64, from the tables of `load_run`, a head or a step at a time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from entropy_monitor.dashboards.shown_columns import HEAD_COLUMNS, LAYER_COLUMNS
from entropy_monitor.records import ABOVE_FLOOR, SHARE
from entropy_monitor.run import load_run

Doubles = npt.NDArray[np.float64]
HEAD_KEY, LAYER_KEY = ["layer", "call", "head"], ["layer"]
IS_BAD_LOW = {column.name: column.bad == "low" for column in (*HEAD_COLUMNS, *LAYER_COLUMNS)}


def buckets(length: int, most: int) -> list[range]:
    """Places in at most so many stretches."""
    bounds = [length * i // most for i in range(most + 1)] if length > most else list(range(length + 1))
    return [range(first, stop) for first, stop in pairwise(bounds)]


def finite(values: Doubles, how: Any) -> float:
    """A reduction of what is finite; NaN where nothing is."""
    known = values[np.isfinite(values)]
    return float(how(known)) if known.size else float("nan")


class NaiveView:
    """A run's figures, looked up one by one."""

    def __init__(self, run_dir: Path) -> None:
        self.run = load_run(run_dir)
        heads = self.run.heads.astype({"layer": str})
        heads[SHARE] = heads["entropy"].astype(float) / heads["max_entropy"].astype(float).where(
            heads["max_entropy"] > 0
        )
        heads[ABOVE_FLOOR] = heads["entropy"].astype(float) - heads["floor_row"].astype(float)
        self.tables = {"heads": heads, "layers": self.run.layers.astype({"layer": str})}
        first = pd.concat(list(self.tables.values())).groupby("layer")["layer_index"].min()
        self.layers = sorted(first.index, key=lambda name: (first[name], name))
        known = set(map(tuple, heads[HEAD_KEY].drop_duplicates().to_numpy()))
        self.rows = [key for name in self.layers for key in sorted(known) if key[0] == name]
        self.steps = {name: sorted(set(table["step"])) for name, table in self.tables.items()}

    def cube(self, column: str, table: str = "heads") -> Doubles:
        """`[steps, rows]` of heads, `[steps, layers]` of layers; NaN where there is no row."""
        frame, of = self.tables[table], self.rows if table == "heads" else [(n,) for n in self.layers]
        key = HEAD_KEY if table == "heads" else LAYER_KEY
        made = np.full((len(self.steps[table]), len(of)), np.nan)
        for step, value, *place in frame[["step", column, *key]].itertuples(index=False, name=None):
            made[self.steps[table].index(step), of.index(tuple(place))] = value
        return made

    def of_layer(self, layer: int, table: str = "heads") -> list[int]:
        """Columns of `cube` that are of a layer."""
        if table == "layers":
            return [layer]
        return [i for i, (name, _, _) in enumerate(self.rows) if name == self.layers[layer]]

    def band(self, column: str, layer: int, points: int, table: str = "heads") -> dict[str, Any]:
        """A layer's curve: means over its heads, then over stretches of steps; and the ends."""
        values = self.cube(column, table)[:, self.of_layer(layer, table)]
        known = [i for i in range(len(values)) if np.isfinite(values[i]).any()]
        made: dict[str, Any] = {"layer": layer, "steps": [], "mean": [], "low": [], "high": []}
        for bucket in buckets(len(known), points):
            own = values[[known[i] for i in bucket]]
            made["steps"].append(self.steps[table][known[bucket[0]]])
            made["mean"].append(np.mean([finite(row, np.mean) for row in own]))
            made["low"].append(finite(own, np.min))
            made["high"].append(finite(own, np.max))
        return made

    def grid(self, column: str, position: int, positions: int) -> list[float]:
        """The worst reading of each head over a position's steps, else the last one within 64 before."""
        cube = self.cube(column)
        bucket = buckets(len(cube), positions)[position]
        worst = np.fmin if IS_BAD_LOW[column] else np.fmax
        values = [float(worst.reduce(cube[bucket.start : bucket.stop, row])) for row in range(cube.shape[1])]
        if column in ("entropy", "max_entropy", SHARE):
            return values
        for row, value in enumerate(values):
            earlier = cube[max(0, bucket.start - 64) : bucket.start, row]
            earlier = earlier[~np.isnan(earlier)]
            values[row] = float(earlier[-1]) if np.isnan(value) and earlier.size else value
        return values

    def largest(self, column: str) -> tuple[list[int], list[float]]:
        """Steps and largest value of any head, where all that are there and were ever read are known."""
        cube = self.cube(column)
        there = ~np.isnan(self.cube("layer_index"))
        steps, values = [], []
        for i, row in enumerate(cube):
            ever = ~np.isnan(cube[: i + 1]).all(axis=0)
            if (there[i] & ever & np.isnan(row)).any() or not np.isfinite(row).any():
                continue
            steps.append(self.steps["heads"][i])
            values.append(finite(row, np.max))
        return steps, values

    def worst_layer(self, column: str, table: str = "heads") -> int | None:
        """The layer with the worst reading of the whole run."""
        cube = self.cube(SHARE if column == "entropy" else column, table)
        if not np.isfinite(cube).any():
            return None
        worst = finite(cube, np.min if IS_BAD_LOW[column] else np.max)
        (place, *_) = np.argwhere(cube == worst)[:, 1].tolist()
        return place if table == "layers" else self.layers.index(self.rows[place][0])

    def scalar(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a scalar."""
        rows = self.run.scalars[self.run.scalars["name"] == name].sort_values("step")
        return rows["step"].tolist(), rows["value"].tolist()


def compact(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """A series without what is not finite."""
    kept = [(s, v) for s, v in zip(steps, values, strict=True) if np.isfinite(v)]
    return [s for s, _ in kept], [v for _, v in kept]
