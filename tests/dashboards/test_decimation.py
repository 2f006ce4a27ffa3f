from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from entropy_monitor.dashboards.decimation import bucket_starts, min_max


@pytest.mark.parametrize("length", [0, 1, 2, 5, 99, 100, 101, 199, 12345])
@pytest.mark.parametrize("most", [1, 2, 7, 100])
def test_buckets_cover_everything_and_are_of_nearly_equal_size(length, most):
    starts = bucket_starts(length, most)
    sizes = np.diff(np.append(starts, length))
    assert len(starts) == min(length, most)
    assert sizes.sum() == length
    if length:
        assert starts[0] == 0
        assert sizes.min() >= 1
        assert sizes.max() - sizes.min() <= 1


def naive(steps, low, high, most):
    """Each bucket's least and largest value, in the order in which they stand."""
    known = [i for i in range(len(steps)) if not np.isnan(low[i]) and not np.isnan(high[i])]
    buckets = max(1, most // 2)
    bounds = (
        [len(known) * b // buckets for b in range(buckets + 1)]
        if len(known) > buckets
        else range(len(known) + 1)
    )
    points = []
    for first, stop in pairwise(bounds):
        own = known[first:stop]
        least = min(own, key=lambda i: (low[i], i))
        largest = min(own, key=lambda i: (-high[i], i))
        pair = [(least, low[least]), (largest, high[largest])]
        if largest < least:
            pair.reverse()
        points += pair[:1] if pair[0] == pair[1] else pair
    return [steps[i] for i, _ in points], [value for _, value in points]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("length", [1, 2, 9, 40, 41, 400, 1003])
@pytest.mark.parametrize("banded", [False, True])
def test_curves_pass_through_the_extremes_of_each_stretch(seed, length, banded):
    g = np.random.default_rng(seed)
    steps = np.cumsum(g.integers(1, 5, length)) - 10
    low = g.integers(0, 6, length).astype(np.float32)  # with equal ones
    high = low + g.integers(0, 3, length).astype(np.float32) if banded else low
    low[g.random(length) < 0.2] = np.nan
    most = 40
    found, values = min_max(steps, low, high, most)
    assert (found.dtype, values.dtype) == (np.float64, np.float32)
    assert len(found) <= most
    assert (np.diff(found) >= 0).all()
    if not banded and np.isfinite(low).sum() <= most:
        known = np.isfinite(low)
        np.testing.assert_array_equal(found, steps[known])
        np.testing.assert_array_equal(values, low[known])
        return
    expected = naive(steps.tolist(), low.tolist(), high.tolist(), most)
    assert (found.tolist(), values.tolist()) == expected
    if np.isfinite(low).any():
        both = np.isfinite(low) & np.isfinite(high)
        assert (values.min(), values.max()) == (low[both].min(), high[both].max())


def test_a_short_curve_keeps_every_point_whether_or_not_low_and_high_are_one_array():
    steps = np.arange(100)
    values = np.zeros(100, np.float32)
    for high in (values, values.copy()):
        found, drawn = min_max(steps, values, high, 100)
        np.testing.assert_array_equal(found, steps)
        np.testing.assert_array_equal(drawn, values)


def test_a_band_of_few_points_shows_both_its_ends():
    steps, values = min_max(np.array([1, 2]), np.array([0.0, 5.0]), np.array([1.0, 5.0]), 10)
    assert (steps.tolist(), values.tolist()) == ([1, 1, 2], [0, 1, 5])


def test_a_spike_of_one_point_survives():
    low = np.ones(100_000, np.float32)
    low[77_777] = -9
    steps, values = min_max(np.arange(100_000), low, low, 100)
    assert steps[values == -9].tolist() == [77_777]


def test_infinite_values_are_extremes():
    values = np.array([1, np.inf, 2, -np.inf] * 50, np.float32)
    _, drawn = min_max(np.arange(200), values, values, 10)
    assert set(drawn) == {np.inf, -np.inf}


@pytest.mark.parametrize("values", [[], [np.nan], [np.nan] * 500])
def test_nothing_known_gives_no_points(values):
    array = np.array(values, np.float32)
    steps, drawn = min_max(np.arange(len(array)), array, array, 10)
    assert (len(steps), len(drawn), drawn.dtype) == (0, 0, np.float32)
