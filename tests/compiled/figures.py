"""Comparing what was read of compiled code with what was read of the same model in eager mode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

WHICH = ["layer", "layer_index", "call", "head", "attention", "rows_read"]


def assert_same_rows(found: pd.DataFrame, expected: pd.DataFrame, by: Sequence[str] = WHICH) -> None:
    """The same calls and heads, in the same order, of as many rows."""
    columns = list(by)
    pd.testing.assert_frame_equal(
        found[columns].reset_index(drop=True), expected[columns].reset_index(drop=True)
    )


def assert_same_figures(
    found: pd.DataFrame,
    expected: pd.DataFrame,
    tolerance: float,
    unknown: Sequence[str] = (),
    amplified: dict[str, float] | None = None,
) -> None:
    """Which figures are null, and their values; relative where they are large.

    Args:
        found: table of compiled code.
        expected: of eager mode.
        tolerance: of values up to 1.
        unknown: figures that must be null in compiled code.
        amplified: how much more room a figure needs, and why the caller says.
    """
    for name in expected.select_dtypes("floating"):
        if name in unknown:
            assert found[name].isna().all(), name
            continue
        got, want = (table[name].to_numpy(dtype=np.float64) for table in (found, expected))
        assert (np.isnan(got) == np.isnan(want)).all(), f"{name}: {got[:4]}, want {want[:4]}"
        room = tolerance * (amplified or {}).get(str(name), 1) * np.maximum(1, np.abs(want))
        wrong = ~np.isnan(want) & ~(np.abs(got - want) <= room)
        assert not wrong.any(), f"{name}: {got[wrong][:4]}, want {want[wrong][:4]}"


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors of a model's output."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
