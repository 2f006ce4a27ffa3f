"""One figure over training steps for each thing that is measured of layers; and the loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from entropy_monitor.figures import canvas, style
from entropy_monitor.figures.labels import label, low_is_bad, sentence, symbol
from entropy_monitor.figures.lines import draw_layers, draw_maxima, draw_series, finish, title_of
from entropy_monitor.figures.several import as_runs, looks_of
from entropy_monitor.frames import (
    RunTables,
    broken_steps,
    choose_layers,
    column_of,
    curves,
    growth,
    scalar,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


def loss(runs: RunTables | Sequence[RunTables], name: str = "loss", *, ax: Axes | None = None) -> Axes:
    """The loss over steps, or another recorded scalar: pale as recorded, on top its running mean.

    The mean is centred and over about 2 % of the values; runs of fewer than 100 are drawn as they are.
    Crosses at the foot mark steps at which the value was not finite. The axis is logarithmic where the mean
    falls by more than a factor of 30.

    Args:
        runs: a run as `load_run` returns it, or several: one colour each.
        name: which scalar; `run.scalars` has them.
        ax: where to draw; None makes a figure, the axes' `figure`.

    Raises:
        ConfigurationError: there are no runs.
    """
    ax = canvas.axes_on(ax)
    given = as_runs(runs)
    drawn = 0
    for run, look in zip(given, looks_of(given), strict=True):
        series = scalar(run, name)
        alone = len(given) == 1
        colour = style.INK if alone else look.colour
        draw_series(ax, series, colour=colour, label=name if alone else look.name, dashes=look.dashes)
        drawn += len(series)
    if not drawn:
        style.say(ax, f"no {style.plain(name)} was recorded")
    what = style.plain(name)
    finish(ax, title_of(given[0], what) if len(given) == 1 else what, what, legend="run" * (len(given) > 1))
    return ax


def entropy(run: RunTables, layers: Iterable[str] | None = None, *, ax: Axes | None = None) -> Axes:
    """Attention entropy over steps: a line per layer, the mean of its heads, in a band min to max.

    The dotted line is the maximum, mean log n over the rows read: uniform attention.

    Args:
        run: a run as `load_run` returns it.
        layers: names of the layers to draw; None: at most eight, evenly spaced.
        ax: where to draw; None makes a figure, the axes' `figure`.

    Raises:
        ConfigurationError: a layer is not of this run.
    """
    ax = canvas.axes_on(ax)
    remark = draw_entropy(ax, run, layers)
    finish(ax, title_of(run, "attention entropy"), label("entropy"), remark=remark, legend="layer")
    ax.set_ylim(bottom=0.0)
    return ax


def draw_entropy(ax: Axes, run: RunTables, layers: Iterable[str] | None) -> str:
    """The lines of `entropy`, and the remark that goes with them."""
    table = column_of(run, "entropy")
    chosen, remark = choose_layers(table, layers)
    draw_layers(ax, curves(table, chosen), chosen)
    draw_maxima(ax, curves(column_of(run, "max_entropy"), chosen))
    style.mark_broken(ax, broken_steps(run.heads[run.heads["layer"].isin(chosen)], "entropy"))
    return remark


def sigma(
    run: RunTables,
    layers: Iterable[str] | None = None,
    *,
    column: str = "sigma_qk",
    ax: Axes | None = None,
) -> Axes:
    """A spectral norm (or any positive column) over steps on a logarithmic axis, a line per layer.

    A line joins the steps at which the column is known of its layer.

    Args:
        run: a run as `load_run` returns it.
        layers: names of the layers to draw; None: at most eight, evenly spaced.
        column: of `heads` (`sigma_qk`, `sigma_q`, `max_logit`, …: mean and min to max over heads)
            or of `layers` (`sigma_v`, `grad_linf`, `update_sigma`, …). What is not positive cannot
            be drawn and is left out.
        ax: where to draw; None makes a figure, the axes' `figure`.

    Raises:
        ConfigurationError: a layer is not of this run, or no table has that column.
    """
    return _positive(run, column_of(run, column), column, layers, sentence(column), label(column), ax)


def spectral_growth(
    run: RunTables,
    layers: Iterable[str] | None = None,
    *,
    column: str = "sigma_qk",
    ax: Axes | None = None,
) -> Axes:
    """How many times a head's spectral norm has grown since it was first read, a line per layer.

    The value itself depends on width and initialisation; what it has grown by can be compared between layers,
    and tells weights that drive a collapse from weights that do not. Each head is divided by its own first
    value; the line is the mean of a layer's heads, in a band from the least to the most grown.

    Args:
        run: a run as `load_run` returns it.
        layers: names of the layers to draw; None: at most eight, evenly spaced.
        column: a positive column of `heads` or `layers`: `sigma_qk`, `sigma_q`, `sigma_v`, `max_logit`, ….
        ax: where to draw; None makes a figure, the axes' `figure`.

    Raises:
        ConfigurationError: a layer is not of this run, or no table has that column.
    """
    table = growth(column_of(run, column))
    what = f"growth of {symbol(column)} since the start"
    ax = _positive(run, table, column, layers, what, f"{symbol(column)} / first value", ax)
    if ax.lines:
        ax.axhline(1.0, color=style.QUIET, linewidth=0.8, zorder=1)
    return ax


def gradient(
    run: RunTables,
    layers: Iterable[str] | None = None,
    *,
    column: str = "grad_linf",
    ax: Axes | None = None,
) -> Axes:
    """Norm of the gradient of the attention weights over steps, logarithmic, a line per layer.

    The gradient is the one that the optimizer uses: unscaled, after clipping. The paper's second kind of
    instability shows here first: large ℓ∞ norms in early layers.

    Args:
        run: a run as `load_run` returns it.
        layers: names of the layers to draw; None: at most eight, evenly spaced.
        column: `grad_linf` or `grad_l2`.
        ax: where to draw; None makes a figure, the axes' `figure`.

    Raises:
        ConfigurationError: a layer is not of this run, or no table has that column.
    """
    return sigma(run, layers, column=column, ax=ax)


def _positive(
    run: RunTables,
    table: pd.DataFrame,
    column: str,
    layers: Iterable[str] | None,
    what: str,
    ylabel: str,
    ax: Axes | None,
) -> Axes:
    ax = canvas.axes_on(ax)
    chosen, remark = choose_layers(table, layers, low_is_bad=low_is_bad(column))
    table = table.assign(value=table["value"].where(table["value"] > 0))
    lines = curves(table, chosen)
    draw_layers(ax, lines, chosen)
    if any(line["mean"].notna().any() for line in lines.values()):
        ax.set_yscale("log")
    elif chosen:
        style.say(ax, f"{symbol(column)} is not known in this run")
    finish(ax, title_of(run, what), ylabel, remark=remark, legend="layer")
    return ax
