"""Several runs on common axes: how they are told apart, and a line for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.figures import style
from entropy_monitor.figures.lines import NOTHING
from entropy_monitor.frames import RunTables, column_of, largest_known, layer_names, listed, thinned

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Look:
    """How one of several runs is drawn.

    Attributes:
        name: for the legend.
        colour: of its lines.
        dashes: of its lines.
    """

    name: str
    colour: str
    dashes: Any


def as_runs(runs: RunTables | Sequence[RunTables]) -> list[RunTables]:
    """One run, or several, as a list.

    Raises:
        ConfigurationError: there are none.
    """
    given = [cast("RunTables", runs)] if hasattr(runs, "heads") else list(runs)
    if not given:
        raise ConfigurationError("runs is empty; give at least one run to draw")
    return given


def looks_of(runs: Sequence[RunTables], groups: Sequence[str] | None = None) -> list[Look]:
    """A colour for each run, and other dashes once colours are used up; or a colour for each group.

    Args:
        runs: what is to be told apart.
        groups: the group of each run, such as its method. Within one, the first is drawn solid.

    Raises:
        ConfigurationError: there are not as many groups as runs.
    """
    names = style.short([run.name for run in runs])
    if groups is None:
        colours, count = style.OKABE_ITO, len(style.OKABE_ITO)
        return [Look(n, colours[i % count], style.DASHES[i // count % 4]) for i, n in enumerate(names)]
    if len(groups) != len(runs):
        raise ConfigurationError(f"groups names {len(groups)} groups for {len(runs)} runs; give one for each")
    order = list(dict.fromkeys(groups))
    seen = dict.fromkeys(order, 0)
    looks = []
    for name, group in zip(names, groups, strict=True):
        colour = style.OKABE_ITO[order.index(group) % len(style.OKABE_ITO)]
        dashes = style.DASHES[seen[group] % len(style.DASHES)]
        seen[group] += 1
        label = name if name == group else style.plain(f"{group}: {name}")
        looks.append(Look(label, colour, dashes))
    return looks


def layer_of(run: RunTables, layer: str | int | None) -> str | None:
    """A layer by its name or its place in order of execution, from either end; None: the first.

    Returns:
        The name; None for a run that measured nothing.

    Raises:
        ConfigurationError: the run has layers, and not that one.
    """
    known = layer_names(run.heads)
    if not known:
        return None
    if layer is None or isinstance(layer, int):
        place = layer or 0
        if -len(known) <= place < len(known):
            return known[place]
        raise ConfigurationError(f"layer is {place}; run {run.name!r} has layers 0 to {len(known) - 1}")
    if layer not in known:
        raise ConfigurationError(f"layer is {layer!r}; run {run.name!r} has {listed(known)}")
    return layer


def values_of(run: RunTables, column: str, layer: str | None = None) -> pd.DataFrame:
    """`frames.column_of` of a run, of all layers or of one."""
    table = column_of(run, column)
    return table if layer is None else table[table["layer"] == layer]


def mean_known(table: pd.DataFrame) -> pd.Series:
    """The mean over heads by step, of the steps at which any is known."""
    return table[table["known"]].groupby("step")["value"].mean()


def draw_run(ax: Axes, series: pd.Series, look: Look) -> None:
    """A run's line."""
    shown = series.iloc[thinned(series)]
    dots = style.lone_dots(shown)
    width = style.line_width(ax)
    ax.plot(
        shown.index, shown, color=look.colour, linestyle=look.dashes, linewidth=width, label=look.name, **dots
    )


def draw_largest(ax: Axes, tables: Sequence[pd.DataFrame], looks: Sequence[Look]) -> None:
    """The largest value of all heads of each run, logarithmic, where all heads are known."""
    positive = False
    for table, look in zip(tables, looks, strict=True):
        largest = largest_known(table)
        largest = largest.where(largest > 0)
        draw_run(ax, largest, look)
        positive |= bool(largest.notna().any())
    if positive:
        ax.set_yscale("log")
    else:
        style.say(ax, "not known")


def say_if_empty(ax: Axes) -> None:
    """What to read where no line holds a point."""
    if not any(np.size(line.get_xdata()) for line in ax.lines):
        style.say(ax, NOTHING)
