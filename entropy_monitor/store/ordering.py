"""Sorting and grouping the rows of an Arrow table by columns of numbers and texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Indices: TypeAlias = npt.NDArray[np.int64]


def sort_order(rows: pa.Table, columns: Sequence[str]) -> Indices:
    """`[N]`: the places of the rows in ascending order of `columns`; ties stay as they are.

    Texts are ordered by their first appearance, which is enough to bring equal ones together.
    """
    keys = [_codes(rows[name]) for name in reversed(columns)]
    return np.lexsort(keys).astype(np.int64, copy=False)


def group_starts(rows: pa.Table, columns: Sequence[str], order: Indices) -> Indices:
    """`[G]`: where in `order` (as from `sort_order`) each run of rows with equal `columns` begins."""
    changed = np.zeros(len(order), dtype=bool)
    changed[:1] = True
    for name in columns:
        codes = _codes(rows[name])[order]
        changed[1:] |= codes[1:] != codes[:-1]
    return np.flatnonzero(changed).astype(np.int64, copy=False)


def _codes(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    if pa.types.is_string(column.type):
        column = column.combine_chunks().dictionary_encode().indices
    values: npt.NDArray[Any] = np.asarray(column.to_numpy())
    return values
