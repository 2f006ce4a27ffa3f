"""One run on one page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from entropy_monitor.figures import canvas, style
from entropy_monitor.figures.layers import entropy, loss
from entropy_monitor.figures.lines import mark_alerts, title_of
from entropy_monitor.frames import RunTables

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


def overview(
    run: RunTables,
    layers: Iterable[str] | None = None,
    *,
    axes: Sequence[Axes] | None = None,
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """Loss above, entropy of chosen layers below, alerts as dashed lines at the step they opened.

    Args:
        run: a run as `load_run` returns it.
        layers: names of the layers to draw; None: at most eight, evenly spaced.
        axes: two axes to draw on.
        figure: an empty figure to draw on, instead of axes; None makes one.

    Returns:
        The figure, with two axes.

    Raises:
        ConfigurationError: a layer is not of this run, or there are not two axes.
    """
    figure, (above, below) = canvas.panels(
        (2, 1), axes, figure, (canvas.DOUBLE_COLUMN, 4.6), sharex=True, height_ratios=[1.0, 1.7]
    )
    loss(run, ax=above)
    style.dress(above, title_of(run, "loss and attention entropy"), "loss", xlabel="")
    entropy(run, layers, ax=below)
    below.set_title("", loc="left")
    mark_alerts(above, run.alerts)
    mark_alerts(below, run.alerts, labelled=False)
    style.legend_outside(above)
    return canvas.whole(figure)
