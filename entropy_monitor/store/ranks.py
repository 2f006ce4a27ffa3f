"""What several ranks read of the same attention, as if one had read it all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from entropy_monitor.records import Column, Table
from entropy_monitor.store.ordering import Indices, group_starts, sort_order

_Floats: TypeAlias = npt.NDArray[np.float64]


def merge_ranks(table: Table, ranks: Sequence[pa.Table]) -> pa.Table:
    """One row for each key.

    Each column as its `merge` says, with w = `rows_read` of a rank, 1 in a table without: `mean` is
    Σ w x / Σ w; `error` √(Σ (w x)²) / Σ w, for the ranks sample independently, and null where one
    is; `same` the maximum, since all that is known is equal up to rounding. A reading of NaN stays NaN. A
    null is left out of a maximum, and makes a mean null: a floor of some of the rows is none of them all.

    Args:
        table: which table it is.
        ranks: its rows by rank, all of one session; no key twice in one of them.
    """
    if len(ranks) == 1:
        return ranks[0]
    rows = pa.concat_tables(ranks)
    order = sort_order(rows, table.key)
    starts = group_starts(rows, table.key, order)
    if len(starts) == rows.num_rows:
        return rows
    merged = rows.take(pa.array(order[starts]))
    weights = _numbers(rows, "rows_read")[order] if "rows_read" in table.names else np.ones(rows.num_rows)
    for column in table.columns:
        if column.merge is None:
            continue
        values = _merge_column(column, _numbers(rows, column.name)[order], weights, starts)
        place = merged.schema.get_field_index(column.name)
        field = merged.schema.field(place)
        mask = np.isnan(values) if column.nullable else None
        array = pa.array(values.astype(column.dtype), field.type, mask=mask)
        merged = merged.set_column(place, field, array)
    return merged


def _merge_column(column: Column, values: _Floats, weights: _Floats, starts: Indices) -> _Floats:
    if column.merge == "sum":
        return _sum(values, starts)
    if column.merge == "error":
        return _root_mean(values, weights, starts)
    if column.merge == "mean":
        return _mean(values, weights, starts)
    largest: Any = np.fmax if column.nullable else np.maximum
    result: _Floats = largest.reduceat(values, starts)
    return result


def _mean(values: _Floats, weights: _Floats, starts: Indices) -> _Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        # Where the weight is 0, NaN times it would still be NaN.
        return _sum(np.where(weights > 0, weights * values, 0), starts) / _sum(weights, starts)


def _root_mean(errors: _Floats, weights: _Floats, starts: Indices) -> _Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        squares = np.where(weights > 0, (weights * errors) ** 2, 0)
        return np.sqrt(_sum(squares, starts)) / _sum(weights, starts)


def _sum(values: _Floats, starts: Indices) -> _Floats:
    result: _Floats = np.add.reduceat(values, starts)
    return result


def _numbers(rows: pa.Table, name: str) -> _Floats:
    return np.asarray(rows[name].to_numpy(), dtype=np.float64)
