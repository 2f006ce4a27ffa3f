"""Blocks of measured steps summed up while a run is written: what makes long runs quick to look at.

A run of a million measured steps has gigabytes of head rows; who looks at it sees a thousand points. Of every
`BLOCK` records of the same heads, each head's figures are kept once more as mean, least and largest value,
leaving out what is not known or not finite. That takes 4 to 9 % of what the records take, which stay.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from entropy_monitor.records import ABOVE_FLOOR, HEADS, LEVELLED, LEVELS, SHARE, Array, Columns
from entropy_monitor.store.contents import place_columns

BLOCK = 64
"""Records in a block."""

_Floats = npt.NDArray[np.float64]


class Levels:
    """Gathers records and gives a block of `records.LEVELS` whenever one is full.

    A record of other heads than those before it begins a new block; what was gathered of the unfinished
    one is dropped, for the records are there.
    """

    def __init__(self) -> None:
        self._places: Columns = {}
        self._steps: list[int] = []
        self._sums: dict[str, Any] = {}

    def add(self, heads: Columns) -> Columns | None:
        """Takes in the heads of a record; gives a block when that was its last."""
        if not len(heads["step"]):
            return None
        if not self._continues(heads):
            self._begin(heads)
        with np.errstate(invalid="ignore", over="ignore"):  # readings may be infinite
            figures = np.stack([derived(heads, name) for name in LEVELLED])
        known = np.isfinite(figures)
        figures[~known] = np.nan
        sums = self._sums
        sums["count"] += known
        sums["total"] += np.where(known, figures, 0)
        np.fmin(sums["low"], figures, out=sums["low"])
        np.fmax(sums["high"], figures, out=sums["high"])
        sums["broken"] += ~np.isfinite(np.asarray(heads["entropy"]))
        sums["rows_read"] += np.asarray(heads["rows_read"]).astype(np.int64)
        self._steps.append(int(heads["step"][0]))
        return self._end() if len(self._steps) == BLOCK else None

    def _continues(self, heads: Columns) -> bool:
        if not self._steps or int(heads["step"][0]) <= self._steps[-1]:
            return False
        return all(_equal(self._places[name], heads[name]) for name in self._places)

    def _begin(self, heads: Columns) -> None:
        self._places = {name: _kept(heads[name]) for name in place_columns(HEADS)}
        self._steps = []
        rows = len(heads["step"])
        shape = len(LEVELLED), rows
        self._sums = {
            "count": np.zeros(shape, np.int64),
            "total": np.zeros(shape),
            "low": np.full(shape, np.nan),
            "high": np.full(shape, np.nan),
            "broken": np.zeros(rows, np.int64),
            "rows_read": np.zeros(rows, np.int64),
        }

    def _end(self) -> Columns:
        sums, rows = self._sums, len(self._sums["broken"])
        mean = np.where(sums["count"] > 0, sums["total"] / np.maximum(sums["count"], 1), np.nan)
        block: Columns = {
            **self._places,
            "step": np.full(rows, self._steps[0]),
            "until": np.full(rows, self._steps[-1]),
            "measured": np.full(rows, len(self._steps)),
            "rows_read": sums["rows_read"],
            "broken": sums["broken"],
        }
        for i, name in enumerate(LEVELLED):
            for end, values in (("", mean), ("_low", sums["low"]), ("_high", sums["high"])):
                block[name + end] = values[i].astype(np.float32)
        self._steps = []
        return {name: block[name] for name in LEVELS.names}


def derived(heads: Columns, name: str) -> _Floats:
    """A figure of `LEVELLED`, `[rows]`, float64; NaN where it is not known or cannot be formed."""
    if name == SHARE:
        most = np.asarray(heads["max_entropy"], np.float64)
        share: _Floats = np.full(len(most), np.nan)
        np.divide(np.asarray(heads["entropy"], np.float64), most, out=share, where=most > 0)
        return share
    if name == ABOVE_FLOOR:
        return np.asarray(heads["entropy"], np.float64) - np.asarray(heads["floor_row"], np.float64)
    return np.asarray(heads[name], np.float64)


def _kept(column: Array | list[str]) -> Array | list[str]:
    return list(column) if isinstance(column, list) else np.array(column)


def _equal(one: Array | list[str], other: Array | list[str]) -> bool:
    if isinstance(one, list) or isinstance(other, list):
        return list(one) == list(other)
    return np.array_equal(one, other)
