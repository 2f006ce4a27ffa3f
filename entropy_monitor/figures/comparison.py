"""Several runs compared: their curves, and what became of them over a hyperparameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from entropy_monitor.figures import canvas, style
from entropy_monitor.figures.labels import label
from entropy_monitor.figures.layers import loss
from entropy_monitor.figures.several import (
    as_runs,
    draw_largest,
    draw_run,
    looks_of,
    say_if_empty,
    values_of,
)
from entropy_monitor.frames import SHARE, RunTables, thinned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


def compare(
    runs: RunTables | Sequence[RunTables],
    *,
    axes: Sequence[Axes] | None = None,
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """Loss, share of the maximal entropy and largest σ_QK of several runs over training steps.

    Args:
        runs: runs as `load_run` returns them, one colour each.
        axes: three axes to draw on.
        figure: an empty figure to draw on, instead of axes; None makes one.

    Returns:
        The figure, with three axes. In the second a line is the mean over all heads, the thin
        dotted one the lowest head; in the third it joins the steps at which σ_QK is known of all
        heads.

    Raises:
        ConfigurationError: there are no runs, or not three axes.
    """
    given = as_runs(runs)
    looks = looks_of(given)
    figure, (top, share, sigma) = canvas.panels(
        (3, 1), axes, figure, (canvas.DOUBLE_COLUMN, 5.6), sharex=True
    )
    loss(given, ax=top)
    drawn = top.get_legend()
    if drawn is not None:
        drawn.remove()
    for run, look in zip(given, looks, strict=True):
        by_step = values_of(run, SHARE).groupby("step")["value"]
        draw_run(share, by_step.mean(), look)
        lowest = by_step.min()
        lowest = lowest.iloc[thinned(lowest)]
        share.plot(lowest.index, lowest, ":", color=look.colour, linewidth=1.0, **style.lone_dots(lowest))
    say_if_empty(share)
    draw_largest(sigma, [values_of(run, "sigma_qk") for run in given], looks)
    style.dress(top, "loss, running mean (×: not finite)", "loss", xlabel="")
    style.dress(share, "entropy / maximum: mean over heads (dotted: lowest head)", "share", xlabel="")
    style.dress(sigma, "largest spectral norm of W_K W_Qᵀ of any head", label("sigma_qk").split(" = ")[0])
    share.set_ylim(0.0, 1.03)
    style.integer_steps(sigma)
    below = style.narrow(sigma)
    style.legend_outside(sigma if below else top, "run", of=share)
    return canvas.whole(figure)
