"""Curves over training steps: the overview in the paper's form, entropy, spectral norms, floors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from entropy_monitor.figures import style
from entropy_monitor.frames import (
    RunTables,
    broken_steps,
    choose_layers,
    column_of,
    curves,
    finite,
    head_series,
    scalar,
    smooth,
)
from entropy_monitor.records import HEADS, LAYERS, SEVERITIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NOTHING = "nothing measured yet"
NOT_KNOWN = " (not known)"

_LOG_FROM = 30.0
"""Largest over smallest loss from which a linear axis would hide the end of the run."""

# The order is that of tightness; the paper's curve bounds nothing and comes last.
_FLOORS = (
    ("floor_row", "floor: logits of each row", style.OKABE_ITO[2], "-"),
    ("floor_activation", "floor: norms of q and k", style.OKABE_ITO[0], (0, (5, 1.5))),
    ("floor_weights", "floor: weights and inputs", style.OKABE_ITO[3], (0, (6, 1.5, 1.2, 1.5))),
    ("floor_paper", "B(σ_QK, n), the paper's curve", style.OKABE_ITO[5], (0, (1.2, 1.2))),
)


def overview(run: RunTables, layers: Iterable[str] | None = None, *, figure: Figure | None = None) -> Figure:
    """Loss above, entropy of chosen layers below, alerts as dashed lines at the step they opened.

    The form of Figure 1 of "Stabilizing Transformer Training by Preventing Attention Entropy
    Collapse" (Zhai et al., 2023).

    Args:
        run: a run as `load_run` returns it.
        layers: names of the layers to draw; None: at most eight, evenly spaced.
        figure: an empty figure to draw on; None makes one.

    Returns:
        The figure, with two axes.

    Raises:
        ConfigurationError: a layer is not of this run.
    """
    figure = figure if figure is not None else style.new_figure(8.6, 5.2)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1.0, 1.7])
    loss_curve(above, scalar(run))
    style.dress(above, plain_title(run, "loss and attention entropy"), "loss", xlabel="")
    entropy(run, layers, ax=below)
    below.set_title("", loc="left")
    mark_alerts(above, run.alerts)
    mark_alerts(below, run.alerts, labelled=False)
    style.legend_beside(above)
    return figure


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
    ax = style.axes_on(ax)
    table = column_of(run, "entropy")
    chosen, remark = choose_layers(table, layers)
    _draw_layers(ax, curves(table, chosen), chosen)
    _draw_maxima(ax, curves(column_of(run, "max_entropy"), chosen))
    style.mark_broken(ax, broken_steps(run.heads[run.heads["layer"].isin(chosen)], "entropy"))
    _finish(ax, run, "attention entropy", "entropy (nats)", remark)
    ax.set_ylim(bottom=0.0)
    return ax


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
    ax = style.axes_on(ax)
    table = column_of(run, column)
    chosen, remark = choose_layers(table, layers)
    table = table.assign(value=table["value"].where(table["value"] > 0))
    lines = curves(table, chosen)
    _draw_layers(ax, lines, chosen)
    if any(line["mean"].notna().any() for line in lines.values()):
        ax.set_yscale("log")
    elif chosen:
        style.say(ax, f"{column} is not known in this run")
    _finish(ax, run, _doc(column), f"{column} (log)", remark)
    return ax


def floors(run: RunTables, layer: str, head: int, call: int = 0, *, ax: Axes | None = None) -> Axes:
    """One head's entropy between its floors (Theorem 3.1) and its maximum.

    A true floor lies below the entropy at every step at which it is known; a line joins these
    steps. `floor_paper` is drawn for comparison and bounds nothing. A floor that does not hold for
    this attention is named in the legend as not known.

    Args:
        run: a run as `load_run` returns it.
        layer: name of the layer.
        head: query head, from 0.
        call: nth attention call of the layer within one forward, from 0.
        ax: where to draw; None makes a figure, the axes' `figure`.

    Raises:
        ConfigurationError: the run has no such layer, head or call.
    """
    ax = style.axes_on(ax)
    rows = head_series(run.heads, layer, head, call)
    steps = rows.index.to_numpy()
    if not rows.empty:
        maximum, measured = finite(rows["max_entropy"]), finite(rows["entropy"])
        dots = style.lone_dots(maximum)
        ax.plot(steps, maximum, ":", color=style.QUIET, label="maximum, log n", **dots)
        ax.plot(steps, measured, color=style.INK, linewidth=2, label="entropy", **style.lone_dots(measured))
        spread = 2 * finite(rows["entropy_se"]).fillna(0.0)
        ax.fill_between(steps, measured - spread, measured + spread, color=style.INK, alpha=0.15, linewidth=0)
        for column, label, colour, dashes in _FLOORS:
            values = finite(rows[column].dropna())
            known = "" if values.notna().any() else NOT_KNOWN
            look: dict[str, Any] = {"color": colour, "linestyle": dashes, **style.lone_dots(values)}
            ax.plot(values.index, values, label=label + known, **look)
        style.mark_broken(ax, broken_steps(rows.reset_index(), "entropy"))
    where = f"{style.short([layer])[0]}, head {head}" + (f", call {call}" if call else "")
    _finish(ax, run, f"entropy and its floors: {where}", "nats", "", legend="")
    ax.set_ylim(bottom=0.0)
    return ax


def loss_curve(
    ax: Axes,
    loss: pd.Series,
    *,
    colour: str = style.INK,
    label: str = "loss",
    dashes: str | tuple[float, tuple[float, ...]] = "-",
) -> None:
    """A loss by step: raw and pale, its running mean on top; crosses where it was not finite."""
    mean, window = smooth(loss)
    if mean.notna().any():
        if window > 1:
            ax.plot(loss.index, finite(loss), color=colour, alpha=0.22, linewidth=0.8)
            label = f"{label}, mean of {window}" if label == "loss" else label
        look: dict[str, Any] = {"color": colour, "linestyle": dashes, "linewidth": 1.6}
        ax.plot(mean.index, mean, label=label, **look, **style.lone_dots(mean))
        if mean.min() > 0 and mean.max() / mean.min() > _LOG_FROM:
            ax.set_yscale("log")
    elif loss.empty:
        style.say(ax, "no loss was recorded")
    style.mark_broken(ax, [int(step) for step in loss.index[finite(loss).isna()]])
    style.integer_steps(ax)


def mark_alerts(ax: Axes, alerts: pd.DataFrame, *, labelled: bool = True) -> None:
    """A dashed line at each step at which alerts opened, in the worst severity's colour."""
    marked: set[int] = set()
    for severity in reversed(SEVERITIES):
        if alerts.empty:
            return
        of_kind = alerts.loc[alerts["severity"] == severity, "opened"]
        steps = sorted({int(step) for step in of_kind} - marked)
        marked.update(steps)
        plural = "" if len(of_kind) == 1 else "s"
        for i, step in enumerate(steps):
            ax.axvline(
                step,
                color=style.SEVERITY_COLOURS[severity],
                linestyle="--",
                linewidth=1.1,
                alpha=0.9,
                label=f"{len(of_kind)} {severity} alert{plural}" if labelled and not i else None,
            )


def plain_title(run: RunTables, what: str) -> str:
    """`run name: what`, with the run's name cut and drawn literally."""
    return f"{style.short([run.name])[0]}: {what}"


def _draw_layers(ax: Axes, lines: Mapping[str, pd.DataFrame], layers: Sequence[str]) -> None:
    """A line and a band per layer; a layer that has none is named in the legend as not known."""
    chosen = list(dict.fromkeys(layers))
    for colour, layer, name in zip(
        style.depth_colours(len(chosen)), chosen, style.short(chosen), strict=True
    ):
        if layer not in lines:
            ax.plot([], [], color=colour, linewidth=1.6, label=name + NOT_KNOWN)
            continue
        line = lines[layer]
        look: dict[str, Any] = {"color": colour, "linewidth": 1.6, **style.lone_dots(line["mean"])}
        ax.fill_between(line.index, line["min"], line["max"], color=colour, alpha=0.13, linewidth=0)
        ax.plot(line.index, line["mean"], label=name, **look)


def _draw_maxima(ax: Axes, lines: Mapping[str, pd.DataFrame]) -> None:
    if not lines:
        return
    table = pd.concat({name: line["mean"] for name, line in lines.items()}, axis=1)
    spread = (table.max(axis=1) - table.min(axis=1)).max()
    together = bool(spread <= 0.01 * table.max(axis=1).max())
    shown: Sequence[pd.Series] = [table.mean(axis=1)] if together else [table[name] for name in table.columns]
    colours = [style.QUIET] if together else style.depth_colours(len(shown))
    for i, (colour, maximum) in enumerate(zip(colours, shown, strict=True)):
        label = None if i else "maximum, log n"
        ax.plot(maximum.index, maximum, ":", color=colour, label=label, **style.lone_dots(maximum))


def _finish(ax: Axes, run: RunTables, what: str, ylabel: str, remark: str, legend: str = "layer") -> None:
    if not ax.lines:
        style.say(ax, NOTHING)
    style.dress(ax, plain_title(run, what), ylabel)
    style.note(ax, remark)
    style.integer_steps(ax)
    style.legend_beside(ax, legend)


def _doc(column: str) -> str:
    spec = HEADS if column in HEADS.names else LAYERS
    return spec[column].doc.removesuffix(" of this head") if column in spec.names else column
