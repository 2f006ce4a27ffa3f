from __future__ import annotations

import math

import numpy as np
import pytest

from entropy_monitor.dashboards.decimation import bucket_starts
from entropy_monitor.dashboards.reductions import extreme, part, reduced, row_largest, row_least, row_mean


@pytest.fixture(params=range(4))
def values(request):
    g = np.random.default_rng(request.param)
    made = g.standard_normal((40, 6)).astype(np.float32)
    made[g.random(made.shape) < 0.3] = np.nan
    made[g.random(made.shape) < 0.1] = np.inf
    made[g.random(made.shape) < 0.1] = -np.inf
    made[3], made[4] = np.nan, np.inf
    return made


@pytest.mark.parametrize(("function", "naive"), [(row_mean, np.mean), (row_least, min), (row_largest, max)])
def test_rows_are_reduced_to_what_is_finite(values, function, naive):
    found = function(values)
    assert found.dtype == np.float32
    for row, each in zip(values.astype(np.float64), found, strict=True):
        known = row[np.isfinite(row)]
        assert each == pytest.approx(naive(known), rel=1e-6, abs=1e-6) if known.size else np.isnan(each)
    assert function(np.empty((0, 3), np.float32)).shape == (0,)
    assert np.isnan(function(np.empty((2, 0), np.float32))).all()


@pytest.mark.parametrize("most", [1, 7, 40, 100])
@pytest.mark.parametrize(("how", "naive"), [("mean", np.mean), ("low", min), ("high", max)])
def test_stretches_are_reduced_to_what_is_known(values, most, how, naive):
    values = np.where(np.isinf(values), np.float32(1), values)
    starts = bucket_starts(len(values), most)
    found = reduced(values, starts, how)
    assert (found.dtype, found.shape) == (np.float32, (len(starts), 6))
    for bucket, row in zip(np.split(values.astype(np.float64), starts[1:]), found, strict=True):
        for column, each in zip(bucket.T, row, strict=True):
            known = column[~np.isnan(column)]
            assert each == pytest.approx(naive(known), rel=1e-6, abs=1e-6) if known.size else np.isnan(each)
    np.testing.assert_array_equal(reduced(values[:, 0], starts, how), found[:, 0])
    assert reduced(values[:0], starts[:0], how).shape == (0, 6)


def test_columns_side_by_side_are_not_copied(values):
    np.testing.assert_array_equal(part(values, [1, 2, 3]), values[:, 1:4])
    assert np.shares_memory(part(values, [1, 2, 3]), values)
    np.testing.assert_array_equal(part(values, [0, 2]), values[:, [0, 2]])
    assert part(values, []).shape == (40, 0)


def test_extremes_of_what_is_finite(values):
    known = values[np.isfinite(values)]
    assert (extreme(values, "low"), extreme(values, "high")) == (known.min(), known.max())
    for nothing in (values[:0], values[:, :0], values[3], values[4], np.array([-np.inf, np.nan], np.float32)):
        assert math.isnan(extreme(nothing, "low"))
        assert math.isnan(extreme(nothing, "high"))
