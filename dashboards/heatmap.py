"""A grid of figures, layers by heads, as an RGB picture: numpy only, no plotting library."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from entropy_monitor.dashboards.colour_scale import SHARES, ColourScale

FloatArray = npt.NDArray[np.float64]
Image = npt.NDArray[np.uint8]

# Least-squares polynomial, per channel, of matplotlib's viridis: at most 0.017 from it. Viridis is
# even in lightness and can be told apart with every common colour blindness.
_VIRIDIS = np.array(
    [
        [0.2745, 0.0058, 0.3327],
        [0.1077, 1.3965, 1.3868],
        [-0.3272, 0.2148, 0.0920],
        [-4.5999, -5.7582, -19.2918],
        [6.2037, 14.1540, 56.6563],
        [4.7518, -13.7494, -65.3210],
        [-5.4321, 4.6416, 26.2721],
    ]
)
UNKNOWN = (190, 190, 190)
BROKEN = (213, 94, 0)
PAPER = (255, 255, 255)
INK = (60, 60, 60)

# 3 × 5 pixels a sign, rows from the top, the leftmost pixel first.
_GLYPHS = {
    "0": "111101101101111",
    "1": "010110010010111",
    "2": "111001111100111",
    "3": "111001111001111",
    "4": "101101111001001",
    "5": "111100111001111",
    "6": "111100111101111",
    "7": "111001001001001",
    "8": "111101111101111",
    "9": "111101111001111",
    ".": "000000000000010",
    "e": "111101111100111",
    "-": "000000111000000",
}
_WIDE = 1000  # pixels that a picture's cells aim to stay within, either way
_MARGIN = 6


def viridis(share: FloatArray) -> Image:
    """Colours of shares: 0 dark violet, 1 yellow; beyond 0 … 1 as the nearer end.

    Args:
        share: any shape, float; NaN is grey (not known), an infinity red (what was measured is not finite).

    Returns:
        `[*share.shape, 3]`, uint8.
    """
    known = np.isfinite(share)
    x = np.clip(np.where(known, share, 0.0), 0.0, 1.0)
    powers = x[..., None] ** np.arange(len(_VIRIDIS))
    colours: Image = (np.clip(powers @ _VIRIDIS, 0.0, 1.0) * 255).round().astype(np.uint8)
    colours[np.isnan(share)] = UNKNOWN
    colours[np.isinf(share)] = BROKEN
    return colours


def cell_size(rows: int, columns: int) -> int:
    """Pixels along a cell's edge: 28, less (but 3) where the picture would outgrow a screen."""
    return int(np.clip(_WIDE // max(rows, columns, 1), 3, 28))


def heatmap(values: FloatArray, rows: Sequence[int] | None = None, scale: ColourScale = SHARES) -> Image:
    """Draws a grid with row and column numbers and, at the right, what the colours stand for.

    Args:
        values: `[rows, columns]`, at least one of each; NaN where there is nothing to show, infinite where
            what was measured is not finite.
        rows: the number written at each row; by default 0, 1, ….
        scale: which figure has which colour; by default shares from 0 to 1.

    Returns:
        `[height, width, 3]`, uint8.

    Raises:
        ValueError: the grid is empty or not two-dimensional, or `rows` is not as long as it.
    """
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"a heatmap needs a grid of at least one cell, not shape {values.shape}")
    names = range(values.shape[0]) if rows is None else rows
    if len(names) != values.shape[0]:
        raise ValueError(f"{len(names)} row numbers for {values.shape[0]} rows")
    size = cell_size(*values.shape)
    zoom = 2 if size >= 14 else 1
    cells = _enlarge(viridis(scale.shares(values)), size)
    left = max(_text(str(n), zoom).shape[1] for n in names) + 2 * _MARGIN
    bottom = 5 * zoom + 2 * _MARGIN
    top = _MARGIN
    height = max(cells.shape[0], 12 * 5 * zoom)
    ticks = [(place, _text(text, zoom)) for place, text in scale.ticks]
    bar = _enlarge(viridis(np.linspace(1.0, 0.0, height))[:, None], 1).repeat(size, axis=1)
    bar_x = left + cells.shape[1] + 2 * _MARGIN
    width = bar_x + size + max(mark.shape[1] for _, mark in ticks) + 2 * _MARGIN
    canvas: Image = np.full((top + height + bottom, width, 3), PAPER, dtype=np.uint8)
    canvas[top : top + cells.shape[0], left : left + cells.shape[1]] = cells
    canvas[top : top + height, bar_x : bar_x + size] = bar
    for place, mark in ticks:
        _stamp(canvas, mark, top + round((1 - place) * (height - 5 * zoom)), bar_x + size + _MARGIN)
    for row in _spaced(len(names), size, 5 * zoom + 2):
        mark = _text(str(names[row]), zoom)
        middle = top + row * size + size // 2
        _stamp(canvas, mark, middle - mark.shape[0] // 2, left - _MARGIN - mark.shape[1])
    widest = _text(str(values.shape[1] - 1), zoom).shape[1]
    for column in _spaced(values.shape[1], size, widest + 3):
        mark = _text(str(column), zoom)
        middle = left + column * size + size // 2
        _stamp(canvas, mark, top + cells.shape[0] + _MARGIN, middle - mark.shape[1] // 2)
    return canvas


def _enlarge(cells: Image, size: int) -> Image:
    """Repeats each cell, with a thin light line between cells that are large enough for it."""
    large = cells.repeat(size, axis=0).repeat(size, axis=1)
    if size >= 8:
        large[size - 1 :: size] = PAPER
        large[:, size - 1 :: size] = PAPER
    return large


def _spaced(count: int, size: int, room: int) -> range:
    """Which of `count` numbers to write, so that each has `room` pixels."""
    return range(0, count, -(-room // size))


def _text(number: str, zoom: int) -> npt.NDArray[np.bool_]:
    """A number as a mask, `[5 zoom, (4 n - 1) zoom]`."""
    glyphs = [np.array(list(_GLYPHS[d])).reshape(5, 3) == "1" for d in number]
    gap = np.zeros((5, 1), dtype=bool)
    line = np.concatenate([part for glyph in glyphs for part in (glyph, gap)][:-1], axis=1)
    return line.repeat(zoom, axis=0).repeat(zoom, axis=1)


def _stamp(canvas: Image, mask: npt.NDArray[np.bool_], y: int, x: int) -> None:
    """Writes a mask in ink; what would fall off the canvas is cut."""
    y, x = max(y, 0), max(x, 0)
    window = canvas[y : y + mask.shape[0], x : x + mask.shape[1]]
    window[mask[: window.shape[0], : window.shape[1]]] = INK
