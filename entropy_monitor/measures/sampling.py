"""Which query rows to read, and how far their mean may lie from the mean over all rows."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from entropy_monitor.errors import ConfigurationError

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: its multiples mod 2^64 fill the circle evenly
_RESOLUTION = 20  # bits of an offset; 2^20 · 10^6 rows · 10^6 rows still fits int64


def systematic_rows(
    num_rows: int,
    count: int | Literal["all"],
    step: int,
    device: torch.device | str | None = None,
) -> Tensor:
    """Choose query rows in equal strides; over the steps every row is read equally often.

    The offset is `frac(step / golden ratio)` strides: it depends on nothing but the step, so every
    layer, rank and recomputation reads the same rows and no random state is touched.

    Args:
        num_rows: number of query rows Tq, at most 10^6.
        count: rows to choose; `"all"` or anything from num_rows up chooses every row.
        step: training step.
        device: where the indices are made. Nothing is copied between devices.

    Returns:
        `[min(count, num_rows)]`, int64, ascending and distinct.

    Raises:
        ConfigurationError: if count is neither "all" nor a positive integer, or num_rows is out of
            range.
    """
    if not 0 <= num_rows <= 10**6:
        raise ConfigurationError(f"num_rows must be within 0 and 10^6, got {num_rows}")
    if count == "all":
        count = num_rows
    elif not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ConfigurationError(f"rows must be a positive integer or 'all', got {count!r}")
    if count >= num_rows:
        return torch.arange(num_rows, dtype=torch.int64, device=device)
    offset = (step * _GOLDEN % 2**64) >> (64 - _RESOLUTION)
    strides = torch.arange(count, dtype=torch.int64, device=device) * 2**_RESOLUTION + offset
    rows: Tensor = (strides * num_rows).div(count * 2**_RESOLUTION, rounding_mode="floor")
    return rows


@torch.no_grad()
def systematic_standard_error(values: Tensor, weights: Tensor, num_rows: int) -> Tensor:
    """Standard error of each head's mean that comes from reading systematic rows only.

    With `y_r` the mean over the batch at a position, by weight, and `f = R / num_rows`:

        var = (1 - f) / R · Σ_r (y_{r+1} - y_r)² / (2 (R - 1)) + (1 - f²) / 12 · ((y_R - y_1) / R)²

    The first term, successive differences (Wolter, Introduction to Variance Estimation, chapter 8),
    leaves out a trend over the rows such as a causal mask makes, which equal strides average out,
    but for what the second term holds: rows that start early or late in their stride read a trend
    too low or too high at its ends. Positions without a valid row are skipped. What another batch
    would have given is not in it. Nothing here waits for the device.

    Args:
        values: `[B, H, R]`, a figure of each row read, rows ascending.
        weights: broadcastable to values, 1 = valid row, 0 = not (its value may be anything, NaN
            too).
        num_rows: number of query rows there are.

    Returns:
        `[H]`: 0 when all rows were read; NaN when fewer than two positions hold a valid row.

    Raises:
        ConfigurationError: if values are not `[B, H, R]`, or more rows were read than there are.
    """
    if values.dim() != 3 or values.shape[-1] > num_rows:
        raise ConfigurationError(
            f"values must be [batch, heads, rows] with at most num_rows={num_rows} rows, "
            f"got shape {tuple(values.shape)}"
        )
    H, R = values.shape[1:]
    if num_rows == R:
        return values.new_zeros(H)
    if R < 2:
        return values.new_full((H,), math.nan)
    w = weights.to(values.dtype).expand_as(values)
    total = w.sum(0)
    y = torch.where(w > 0, w * values, 0.0).sum(0) / total
    # Valid positions first, in order, so that neighbours in the sorted rows are successive valid
    # positions.
    valid, order = (total > 0).sort(dim=-1, descending=True, stable=True)
    y = y.gather(-1, order)
    squares = torch.where(valid[:, 1:], y.diff(dim=-1).square(), 0.0).sum(-1)
    n = valid.sum(-1)
    last = y.gather(-1, (n - 1).clamp(min=0)[:, None])[:, 0]
    read = R / num_rows
    variance = (1 - read) * squares / (2 * n * (n - 1))
    variance = variance + (1 - read**2) / 12 * ((last - y[:, 0]) / n).square()
    return torch.where(n >= 2, variance.sqrt(), math.nan)
