"""Figures that pyplot does not know of, and that notebooks show all the same."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from entropy_monitor.errors import ConfigurationError

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

SINGLE_COLUMN = 3.35
"""Width in inches of a column of a two-column journal (85 mm)."""

DOUBLE_COLUMN = 6.9
"""Width in inches of the text of a two-column journal (175 mm)."""

_DPI = 110


class ShownFigure(Figure):
    """A figure that IPython shows without pyplot or `%matplotlib inline`."""

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        self.savefig(buffer, format="png", dpi=_DPI, facecolor="white")
        return buffer.getvalue()


class OnlyAxes(Axes):
    """The only axes of a figure that was made for them: shown as that figure."""

    def _repr_png_(self) -> bytes:
        return cast("ShownFigure", self.figure)._repr_png_()


def new_figure(width: float = SINGLE_COLUMN, height: float = 2.4) -> Figure:
    """An empty figure that arranges what is drawn on it; pyplot does not know of it.

    Args:
        width: in inches; `SINGLE_COLUMN` and `DOUBLE_COLUMN` are those of a journal.
        height: in inches.
    """
    return ShownFigure(figsize=(width, height), layout="constrained")


def axes_on(ax: Axes | None, width: float = DOUBLE_COLUMN, height: float = 2.9) -> Axes:
    """`ax`, or the only axes of a new figure."""
    return ax if ax is not None else new_figure(width, height).add_subplot(axes_class=OnlyAxes)


def panels(
    shape: tuple[int, int],
    axes: Sequence[Axes] | None,
    figure: Figure | SubFigure | None,
    size: tuple[float, float],
    **options: Any,
) -> tuple[Figure | SubFigure, list[Axes]]:
    """The axes of a figure of several panels, row by row: those given, or new ones.

    Args:
        shape: rows and columns.
        axes: where to draw, one for each panel; or None.
        figure: where to make axes when there are none; None makes a figure too.
        size: of a new figure, inches.
        **options: of `Figure.subplots`, for new axes.

    Raises:
        ConfigurationError: `axes` are of another number, or both `axes` and `figure` are given.
    """
    rows, columns = shape
    if axes is None:
        figure = figure if figure is not None else new_figure(*size)
        made = figure.subplots(rows, columns, squeeze=False, **options)
        return figure, list(made.ravel())
    if figure is not None:
        raise ConfigurationError("both axes and figure are given; give one of them")
    given = list(np.asarray(axes, dtype=object).ravel())
    if len(given) != rows * columns:
        raise ConfigurationError(f"axes holds {len(given)} axes; this figure has {rows * columns} panels")
    return given[0].figure, given


def whole(figure: Figure | SubFigure) -> Figure:
    """The figure that a part belongs to."""
    return figure if isinstance(figure, Figure) else figure.figure
