"""Long series made short enough to draw, without losing their extremes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Indices = npt.NDArray[np.intp]


def bucket_starts(length: int, most: int) -> Indices:
    """Where each of at most `most` buckets of nearly equal size begins, ascending; empty for length 0."""
    if length <= most:
        return np.arange(length)
    return np.linspace(0, length, most + 1).astype(np.intp)[:-1]


def min_max(steps: npt.NDArray[np.int64], low: Floats, high: Floats, most: int) -> tuple[Floats, Floats]:
    """A curve of at most `most` points that passes through the extremes of each stretch.

    Args:
        steps: `[n]`, ascending.
        low: `[n]`: the curve, or the least of what each point stands for; NaN is left out.
        high: `[n]`: likewise the largest; equal to `low` where points stand for themselves.
        most: points, at least 2.

    Returns:
        steps (float64) and values (float32): all points where these are no more than `most`, otherwise
        each stretch's minimum and maximum, in the order in which they stand.
    """
    known = np.flatnonzero(~np.isnan(low) & ~np.isnan(high))
    steps, low, high = steps[known], low[known], high[known]
    if len(steps) <= most and np.array_equal(low, high):
        return steps.astype(np.float64), low.astype(np.float32)
    starts = bucket_starts(len(steps), max(1, most // 2))
    if not len(starts):
        return np.empty(0), np.empty(0, np.float32)
    least, largest = _places(low, starts, np.minimum), _places(high, starts, np.maximum)
    first, second = np.minimum(least, largest), np.maximum(least, largest)
    # Where both are one point that has an extent of its own, its minimum comes first.
    rising = least <= largest
    values = np.empty(2 * len(starts), np.float64)
    values[0::2] = np.where(rising, low[least], high[largest])
    values[1::2] = np.where(rising, high[largest], low[least])
    places = np.empty(2 * len(starts), np.intp)
    places[0::2], places[1::2] = first, second
    kept = np.ones(len(places), dtype=bool)
    kept[1::2] = (second > first) | (values[1::2] != values[0::2])
    return steps[places[kept]].astype(np.float64), values[kept].astype(np.float32)


def _places(values: Floats, starts: Indices, extreme: np.ufunc) -> Indices:
    """`[buckets]`: where in `values` each bucket has its first extreme value."""
    best = extreme.reduceat(values, starts)
    sizes = np.diff(np.append(starts, len(values)))
    hits = np.flatnonzero(values == np.repeat(best, sizes))
    bucket = np.searchsorted(starts, hits, side="right") - 1
    first = np.append(True, bucket[1:] != bucket[:-1])
    found: Indices = hits[first]
    return found
