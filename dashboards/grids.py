"""A figure of every head of a record, laid out as layers by heads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from entropy_monitor.records import Columns
from entropy_monitor.trackers.aggregates import FloatArray, call_groups, entropy_share, numbers


@dataclass(frozen=True)
class Grid:
    """Figures laid out as layers by heads.

    Attributes:
        values: `[layers and calls, heads]`, float64; NaN where a head is absent or its figure is not known,
            infinite where what was measured is not finite.
        layers: the layer's index, one for each row of `values`; a layer called twice has two rows.
    """

    values: FloatArray
    layers: tuple[int, ...]


def head_grid(heads: Columns, figures: npt.ArrayLike) -> Grid:
    """Lays figures, one for each row of `heads`, out by layer and call (rows) and head (columns)."""
    if not len(heads["head"]):
        return Grid(np.empty((0, 0)), ())
    order, starts = call_groups(heads)
    column = np.asarray(heads["head"], dtype=np.int64)
    row = np.empty(len(order), dtype=np.int64)
    row[order] = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(order))))
    values = np.full((len(starts), int(column.max()) + 1), np.nan)
    values[row, column] = figures
    indices = np.asarray(heads["layer_index"])[order[starts]]
    return Grid(values, tuple(int(i) for i in indices))


def head_figures(heads: Columns, column: str) -> FloatArray:
    """A figure of each row: `entropy_share` or a column of `heads`; infinite where attention is not finite.

    An entropy that is not finite is a reading, and NaN in a nullable column is none: it stays NaN.
    """
    if column != "entropy_share":
        return numbers(heads, column)
    share = entropy_share(heads)
    share[~np.isfinite(numbers(heads, "entropy"))] = np.inf
    return share
