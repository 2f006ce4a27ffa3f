from __future__ import annotations

import numpy as np
import pytest

from entropy_monitor.dashboards.colour_scale import ColourScale
from entropy_monitor.dashboards.heatmap import BROKEN, PAPER, UNKNOWN, cell_size, heatmap, viridis


def test_colours_are_those_of_viridis() -> None:
    import matplotlib as mpl

    shares = np.linspace(0, 1, 256)  # matplotlib's table has 256 colours
    expected = mpl.colormaps["viridis"](shares)[:, :3] * 255
    assert np.abs(viridis(shares) - expected).max() <= 0.017 * 255 + 0.5  # rounding to uint8


def test_lightness_rises_with_the_share() -> None:
    lightness = viridis(np.linspace(0, 1, 64)) @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(lightness) > 0).all()


def test_what_lies_outside_is_drawn_as_the_nearer_end() -> None:
    np.testing.assert_array_equal(viridis(np.array([-1.0, 2.0])), viridis(np.array([0.0, 1.0])))


def test_nan_is_grey_like_no_share() -> None:
    assert tuple(viridis(np.array([np.nan]))[0]) == UNKNOWN
    assert np.abs(viridis(np.linspace(0, 1, 999)).astype(int) - UNKNOWN).sum(axis=1).min() > 60


def test_what_is_not_finite_is_red_like_no_share() -> None:
    shown = viridis(np.array([np.inf, -np.inf]))
    assert {tuple(colour) for colour in shown} == {BROKEN}
    assert np.abs(viridis(np.linspace(0, 1, 999)).astype(int) - BROKEN).sum(axis=1).min() > 60
    assert BROKEN != UNKNOWN


def cells(picture: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The colour in the middle of every cell: the grid is the block of non-paper right of the row numbers."""
    size = cell_size(rows, columns)
    ink = (picture[6 + size // 3] != PAPER).any(axis=-1)
    run = np.flatnonzero(np.convolve(ink, np.ones(size - 1), "valid") == size - 1)[0]
    middle = size // 2 - 1
    block = picture[6 + middle :, run + middle :]
    return block[: rows * size : size, : columns * size : size][:rows, :columns]


def test_each_cell_shows_its_share_layers_down_heads_across() -> None:
    share = np.arange(12).reshape(3, 4) / 12
    share[1, 2] = np.nan
    np.testing.assert_array_equal(cells(heatmap(share), 3, 4), viridis(share))


def test_colours_follow_the_scale() -> None:
    scale = ColourScale(1.0, 100.0, log=True)
    values = np.array([[1.0, 10.0], [100.0, np.inf]])
    expected = viridis(np.array([[0.0, 0.5], [1.0, np.inf]]))
    np.testing.assert_array_equal(cells(heatmap(values, scale=scale), 2, 2), expected)


def test_the_scale_is_written_beside_it() -> None:
    values = np.ones((2, 2))
    pictures = [heatmap(values, scale=ColourScale(1.0, high, log=True)) for high in (10.0, 1e6)]
    assert pictures[0].shape[1] < pictures[1].shape[1]  # 1e5 is wider than 10


def test_small_models_get_large_cells_and_deep_ones_fit_a_screen() -> None:
    assert cell_size(6, 4) == 28
    assert heatmap(np.ones((96, 128))).shape[1] < 1100
    assert cell_size(2000, 8) == 3


def test_row_numbers_are_the_layers() -> None:
    share = np.ones((2, 2))
    assert not np.array_equal(heatmap(share, [0, 1]), heatmap(share, [0, 7]))
    np.testing.assert_array_equal(heatmap(share, [0, 1]), heatmap(share))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (4,), (1, 2, 3)])
def test_refuses_what_is_no_grid(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a heatmap needs a grid of at least one cell"):
        heatmap(np.ones(shape))


def test_refuses_row_numbers_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="3 row numbers for 2 rows"):
        heatmap(np.ones((2, 2)), [0, 1, 2])
