"""What curves over training steps are drawn with: a line per layer, a loss, the marks of alerts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from entropy_monitor.figures import style
from entropy_monitor.frames import RunTables, finite, smooth, thinned
from entropy_monitor.records import SEVERITIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NOTHING = "nothing measured yet"
NOT_KNOWN = " (not known)"

_LOG_FROM = 30.0
"""Largest over smallest value from which a linear axis would hide the end of the run."""


def draw_series(
    ax: Axes, series: pd.Series, *, colour: Any = style.INK, label: str = "", dashes: Any = "-"
) -> None:
    """One recorded value by step: raw and pale, its running mean on top; crosses where it was not finite."""
    mean, window = smooth(series)
    if mean.notna().any():
        if window > 1:
            raw = finite(series)
            raw = raw.iloc[thinned(raw)]
            ax.plot(raw.index, raw, color=colour, alpha=0.22, linewidth=0.7)
            label = f"{label}, mean of {window}" if label == series.name else label
        mean = mean.iloc[thinned(mean)]
        look: dict[str, Any] = {"color": colour, "linestyle": dashes, "linewidth": style.line_width(ax)}
        ax.plot(mean.index, mean, label=label, **look, **style.lone_dots(mean))
        if mean.min() > 0 and mean.max() / mean.min() > _LOG_FROM:
            ax.set_yscale("log")
    style.mark_broken(ax, [int(step) for step in series.index[finite(series).isna()]])


def draw_layers(ax: Axes, lines: Mapping[str, pd.DataFrame], layers: Sequence[str]) -> None:
    """A line and a band per layer; a layer that has none is named in the legend as not known.

    Args:
        ax: where to draw.
        lines: per layer `mean`, `min` and `max` by step, as `frames.curves` gives them.
        layers: which to draw, in order of depth.
    """
    chosen = list(dict.fromkeys(layers))
    width = style.line_width(ax)
    for colour, layer, name in zip(
        style.depth_colours(len(chosen)), chosen, style.short(chosen), strict=True
    ):
        if layer not in lines:
            ax.plot([], [], color=colour, linewidth=width, label=name + NOT_KNOWN)
            continue
        whole = lines[layer]
        line = whole.iloc[thinned(whole["mean"], whole["min"], whole["max"])]
        look: dict[str, Any] = {"color": colour, "linewidth": width, **style.lone_dots(line["mean"])}
        ax.fill_between(line.index, line["min"], line["max"], color=colour, alpha=0.13, linewidth=0)
        ax.plot(line.index, line["mean"], label=name, **look)


def draw_maxima(ax: Axes, lines: Mapping[str, pd.DataFrame]) -> None:
    """The maximal entropy, dotted: one line where the layers' agree within a hundredth, else one each."""
    if not lines:
        return
    table = pd.concat({name: line["mean"] for name, line in lines.items()}, axis=1)
    spread = (table.max(axis=1) - table.min(axis=1)).max()
    together = bool(spread <= 0.01 * table.max(axis=1).max())
    shown: Sequence[pd.Series] = [table.mean(axis=1)] if together else [table[name] for name in table.columns]
    colours = [style.QUIET] if together else style.depth_colours(len(shown))
    for i, (colour, maximum) in enumerate(zip(colours, shown, strict=True)):
        maximum = maximum.iloc[thinned(maximum)]
        label = None if i else "maximum, log n"
        ax.plot(maximum.index, maximum, ":", color=colour, label=label, **style.lone_dots(maximum))


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


def title_of(run: RunTables, what: str) -> str:
    """`run name: what`, with the run's name cut and drawn literally."""
    return f"{style.short([run.name])[0]}: {what}"


def finish(ax: Axes, title: str, ylabel: str, *, remark: str = "", legend: str | None = "") -> None:
    """Axes over training steps, dressed; `legend` is the title of one, None for none."""
    if not ax.lines and not ax.texts:
        style.say(ax, NOTHING)
    style.dress(ax, title, ylabel, remark=remark)
    style.integer_steps(ax)
    if legend is not None:
        style.legend_outside(ax, legend)
