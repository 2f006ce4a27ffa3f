"""Several runs on common axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.figures import style
from entropy_monitor.figures.lines import NOTHING, loss_curve
from entropy_monitor.frames import SHARE, RunTables, column_of, largest_known, scalar

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def compare(runs: Sequence[RunTables], *, figure: Figure | None = None) -> Figure:
    """Loss, share of the maximal entropy and largest σ_QK of several runs over training steps.

    Args:
        runs: runs as `load_run` returns them, one colour each.
        figure: an empty figure to draw on; None makes one.

    Returns:
        The figure, with three axes. In the second a line is the mean over all heads, the thin
        dotted one the lowest head; in the third it joins the steps at which σ_QK is known of all
        heads.

    Raises:
        ConfigurationError: there are no runs.
    """
    if not runs:
        raise ConfigurationError("runs is empty; give at least one run to draw")
    figure = figure if figure is not None else style.new_figure(8.6, 6.6)
    loss, share, sigma = figure.subplots(3, 1, sharex=True)
    looks = [
        (style.OKABE_ITO[i % len(style.OKABE_ITO)], style.DASHES[i // len(style.OKABE_ITO) % 4])
        for i in range(len(runs))
    ]
    names = style.short([run.name for run in runs])
    measured = positive = False
    for run, name, (colour, dashes) in zip(runs, names, looks, strict=True):
        loss_curve(loss, scalar(run), colour=colour, label=name, dashes=dashes)
        by_step = column_of(run, SHARE).groupby("step")["value"]
        mean, lowest = by_step.mean(), by_step.min()
        look: dict[str, Any] = {"color": colour, "linestyle": dashes, "linewidth": 1.6}
        share.plot(mean.index, mean, **look, **style.lone_dots(mean), label=name)
        share.plot(lowest.index, lowest, ":", color=colour, linewidth=1.0, **style.lone_dots(lowest))
        largest = largest_known(column_of(run, "sigma_qk"))
        largest = largest.where(largest > 0)
        sigma.plot(largest.index, largest, **look, **style.lone_dots(largest))
        measured |= bool(mean.notna().any())
        positive |= bool(largest.notna().any())
    if positive:
        sigma.set_yscale("log")
    if not measured:
        style.say(share, NOTHING)
    _finish(loss, share, sigma)
    return figure


def _finish(loss: Axes, share: Axes, sigma: Axes) -> None:
    style.dress(loss, "loss, running mean (×: not finite)", "loss", xlabel="")
    style.dress(share, "entropy / maximum: mean over heads (dotted: lowest head)", "share", xlabel="")
    style.dress(sigma, "largest spectral norm of W_K W_Qᵀ of any head", "σ_QK (log)")
    share.set_ylim(0.0, 1.03)
    style.integer_steps(sigma)
    style.legend_beside(loss, "run", of=share)
