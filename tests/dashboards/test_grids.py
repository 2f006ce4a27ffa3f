from __future__ import annotations

import math

import numpy as np

from entropy_monitor.dashboards.grids import head_figures, head_grid
from entropy_monitor.records import HEADS
from tests.dashboards.records_factory import bare, head_row


def test_grid_places_heads_whatever_the_order_of_rows() -> None:
    heads = bare(
        0, [head_row(0, 4, 1), head_row(0, 2, 2), head_row(0, 4, 0), head_row(0, 4, 0, call=1)]
    ).heads
    grid = head_grid(heads, [0.25, 0.5, 0.125, 1.0])
    assert grid.layers == (2, 4, 4)
    nan = math.nan
    np.testing.assert_array_equal(grid.values, [[nan, nan, 0.5], [0.125, 0.25, nan], [1.0, nan, nan]])


def test_no_heads_are_an_empty_grid() -> None:
    assert head_grid(HEADS.empty(), []).values.size == 0


def test_a_broken_entropy_is_told_from_one_that_has_no_share() -> None:
    rows = [
        head_row(0, 0, 0, entropy=1.0, max_entropy=4.0),
        head_row(0, 0, 1, entropy=0.0, max_entropy=0.0),
        head_row(0, 0, 2, entropy=math.nan, sigma_qk=math.nan),
    ]
    heads = bare(0, rows).heads
    np.testing.assert_array_equal(head_figures(heads, "entropy_share"), [0.25, math.nan, math.inf])
    np.testing.assert_array_equal(head_figures(heads, "sigma_qk"), [3.0, 4.0, math.nan])
