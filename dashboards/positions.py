"""What a slider over steps shows: one position of a column, or all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from entropy_monitor.dashboards.reductions import Floats, extreme, part, reduced, row_mean
from entropy_monitor.dashboards.shown_columns import ShownColumn
from entropy_monitor.records import HEADS, SHARE
from entropy_monitor.store import Cubes

_LOOK_BACK = 64
"""Measured steps over which a figure that is not read in all of them is carried on."""

_ALWAYS_READ = {column.name for column in HEADS.columns if not column.nullable} | {SHARE}


def worst_at(heads: Cubes, shown: ShownColumn, starts: npt.NDArray[np.intp], position: int) -> Floats:
    """`[places]`: the worst value of the steps that a position stands for; NaN where none is known.

    What is not read in every measured step is carried on for a while.

    Args:
        heads: the columns.
        shown: which one.
        starts: where the steps of each position begin.
        position: one of these.
    """
    cube = heads.column(shown.name, shown.bad)
    first = int(starts[position])
    end = int(starts[position + 1]) if position + 1 < len(starts) else len(cube)
    values: Floats = (np.fmin if shown.bad == "low" else np.fmax).reduce(cube[first:end], axis=0)
    if shown.name not in _ALWAYS_READ:
        for earlier in cube[max(0, first - _LOOK_BACK) : first][::-1]:
            if not np.isnan(values).any():
                break
            values = np.where(np.isnan(values), earlier, values)
    return values


def finite_range(cubes: Cubes, column: str) -> tuple[float | None, float | None]:
    """The least and the largest finite value of the whole run; None where there is none."""
    low, high = (extreme(cubes.column(column, end), end) for end in ("low", "high"))
    return None if np.isnan(low) else low, None if np.isnan(high) else high


def at_all(
    cubes: Cubes, column: str, starts: npt.NDArray[np.intp], of_layers: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """A column at every position.

    Args:
        cubes: the columns.
        column: which one.
        starts: where the steps of each position begin.
        of_layers: the places of each layer.

    Returns:
        `steps` `[P]`; `low` and `high` `[P, places]`, the least and largest value of the steps that a
        position stands for, high None where they are one; `mean` `[P, layers]`, over places and steps.
    """
    low, high, mean = (cubes.column(column, end) for end in ("low", "high", "mean"))
    means = [reduced(row_mean(part(mean, own)), starts, "mean") for own in of_layers]
    is_exact = len(starts) == len(cubes.steps) and not cubes.in_blocks
    return {
        "steps": cubes.steps[starts].astype(np.float64),
        "low": reduced(low, starts, "low"),
        "high": None if is_exact else reduced(high, starts, "high"),
        "mean": np.stack(means, axis=1) if means else np.empty((len(starts), 0), np.float32),
    }


def spread(values: Floats, places: Sequence[Sequence[int]]) -> Floats:
    """`[P, places]`: a column for each of `places`, which name one column each or none; NaN for those."""
    made = np.full((len(values), len(places)), np.nan, np.float32)
    for to, own in enumerate(places):
        if own:
            made[:, to] = values[:, own[0]]
    return made
