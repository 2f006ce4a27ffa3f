"""Arrays of figures made smaller: heads of a layer as one, stretches of steps as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float32]


def part(values: Floats, columns: Sequence[int]) -> Floats:
    """Some columns; those that stand side by side, as the heads of a layer do, without a copy."""
    if columns and columns[-1] - columns[0] == len(columns) - 1:
        return values[:, columns[0] : columns[-1] + 1]
    return values[:, list(columns)]


def row_mean(values: Floats) -> Floats:
    """`[steps]`: the mean of what is finite; NaN where nothing is."""
    known = np.isfinite(values)
    count = known.sum(axis=1)
    total = np.where(known, values, 0).sum(axis=1, dtype=np.float64)
    mean: Floats = np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)
    return mean


def row_least(values: Floats) -> Floats:
    """`[steps]`: the least of what is finite; NaN where nothing is."""
    least: Floats = np.where(np.isfinite(values), values, np.inf).min(axis=1, initial=np.inf)
    return np.where(np.isinf(least), np.float32(np.nan), least)


def row_largest(values: Floats) -> Floats:
    """`[steps]`: the largest of what is finite; NaN where nothing is."""
    return -row_least(-values)


def reduced(values: Floats, starts: npt.NDArray[np.intp], how: Literal["mean", "low", "high"]) -> Floats:
    """Each stretch of a curve `[steps]`, or of several `[steps, n]`, as one value; NaN is left out.

    Args:
        values: the curve.
        starts: where each stretch begins, as from `decimation.bucket_starts`.
        how: its mean, least or largest value.
    """
    if not len(starts):
        return np.empty((0, *values.shape[1:]), np.float32)
    if len(starts) == len(values):
        return values.astype(np.float32)
    if how != "mean":
        extreme = np.fmin if how == "low" else np.fmax
        return extreme.reduceat(values, starts).astype(np.float32)
    known = ~np.isnan(values)
    total = np.add.reduceat(np.where(known, values, 0).astype(np.float64), starts)
    count = np.add.reduceat(known.astype(np.float64), starts)
    mean: Floats = np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)
    return mean


def extreme(values: Floats, which: Literal["low", "high"]) -> float:
    """The least or the largest finite value; NaN where there is none."""
    reduce = np.fmin.reduce if which == "low" else np.fmax.reduce
    best = reduce(values, axis=None, initial=np.nan)
    if np.isinf(best):
        best = reduce(np.where(np.isfinite(values), values, np.float32(np.nan)), axis=None, initial=np.nan)
    return float(best)
