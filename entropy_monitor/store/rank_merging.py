"""What several ranks read of the same heads, as arrays: what `ranks.merge_ranks` makes of rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from entropy_monitor.records import Merge

Floats = npt.NDArray[np.float32]
_Mask = npt.NDArray[np.bool_]


class RankMerge:
    """Takes in the readings of one rank after another; all arrays are `[steps, places]`.

    Args:
        rules: by name of a column, how readings of it are merged (`records.Column.merge`).
    """

    def __init__(self, rules: Mapping[str, Merge]) -> None:
        self._rules = rules
        self._weight: Any = 0.0
        self._there: Any = False
        self._merged: dict[str, Any] = {}

    def add(self, readings: Mapping[str, Floats], there: _Mask, weight: Floats | None) -> None:
        """Takes in what another rank read.

        Args:
            readings: by name of a column.
            there: where it has a row.
            weight: of each row in means; None where all weigh the same.
        """
        w = np.where(there, 1.0 if weight is None else weight, 0.0)
        self._weight = self._weight + w
        self._there = self._there | there
        for name, values in readings.items():
            rule = self._rules[name]
            if rule in ("max", "same"):
                known = self._merged.get(name)
                self._merged[name] = values if known is None else np.fmax(known, values)
                continue
            with np.errstate(invalid="ignore", over="ignore"):
                # Where the weight is 0, NaN times it would still be NaN.
                term = np.where(there, values, 0.0) if rule == "sum" else np.where(w > 0, w * values, 0.0)
                term = term**2 if rule == "error" else term
                self._merged[name] = self._merged.get(name, 0.0) + term

    def result_into(self, name: str, values: Floats) -> None:
        """Writes a merged column into an array, where any rank has a row."""
        merged, rule = self._merged[name], self._rules[name]
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            if rule in ("mean", "error"):
                merged = (np.sqrt(merged) if rule == "error" else merged) / self._weight
            np.copyto(values, merged, where=self._there, casting="same_kind")
