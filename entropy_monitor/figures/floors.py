"""Entropy and what it cannot lie below: one head over training, all heads at a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.figures import canvas, style
from entropy_monitor.figures.labels import label, symbol
from entropy_monitor.figures.lines import NOT_KNOWN, NOTHING, finish, title_of
from entropy_monitor.figures.tables import at_step, heads_of
from entropy_monitor.frames import (
    RunTables,
    broken_steps,
    finite,
    head_series,
    layer_names,
    lowest_head,
    thinned,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The order is that of tightness; the paper's curve bounds nothing and comes last.
_FLOORS = (
    ("floor_row", "floor: logits of each row", style.OKABE_ITO[2], "-"),
    ("floor_activation", "floor: norms of q and k", style.OKABE_ITO[0], (0, (5, 1.5))),
    ("floor_weights", "floor: weights and inputs", style.OKABE_ITO[3], (0, (6, 1.5, 1.2, 1.5))),
    ("floor_paper", "B(σ_QK, n), the paper's curve", style.OKABE_ITO[5], (0, (1.2, 1.2))),
)


def floors(
    run: RunTables,
    layer: str | None = None,
    head: int | None = None,
    call: int = 0,
    *,
    ax: Axes | None = None,
) -> Axes:
    """One head's entropy between its floors (Theorem 3.1) and its maximum.

    A true floor lies below the entropy at every step at which it is known; a line joins these
    steps. `floor_paper` is drawn for comparison and bounds nothing. A floor that does not hold for
    this attention is named in the legend as not known.

    Args:
        run: a run as `load_run` returns it.
        layer: name of the layer; None: the head whose entropy was the smallest share of its maximum.
        head: query head, from 0; None: the head of this layer of which that is true.
        call: nth attention call of the layer within one forward, from 0.
        ax: where to draw; None makes a figure, the axes' `figure`.

    Raises:
        ConfigurationError: the run has no such layer, head or call; or `head` is given without `layer`.
    """
    ax = canvas.axes_on(ax)
    layer, head, call = _choose(run.heads, layer, head, call)
    rows = head_series(run.heads, layer, head, call)
    if not rows.empty:
        maximum, measured = finite(rows["max_entropy"]), finite(rows["entropy"])
        spread = 2 * finite(rows["entropy_se"]).fillna(0.0)
        kept = thinned(measured, maximum)
        steps = rows.index.to_numpy()[kept]
        maximum, measured, spread = maximum.iloc[kept], measured.iloc[kept], spread.iloc[kept]
        width = style.line_width(ax)
        dots = style.lone_dots(maximum)
        ax.plot(steps, maximum, ":", color=style.QUIET, label="maximum, log n", **dots)
        dots = style.lone_dots(measured)
        ax.plot(steps, measured, color=style.INK, linewidth=1.3 * width, label="entropy", **dots)
        ax.fill_between(steps, measured - spread, measured + spread, color=style.INK, alpha=0.15, linewidth=0)
        for column, text, colour, dashes in _FLOORS:
            values = finite(rows[column].dropna())
            values = values.iloc[thinned(values)]
            known = "" if values.notna().any() else NOT_KNOWN
            look: dict[str, Any] = {"color": colour, "linestyle": dashes, **style.lone_dots(values)}
            ax.plot(values.index, values, label=text + known, linewidth=width, **look)
        style.mark_broken(ax, broken_steps(rows.reset_index(), "entropy"))
    where = f"{style.short([layer])[0]}, head {head}" + (f", call {call}" if call else "")
    what = "entropy and its floors" + (f": {where}" if layer else "")
    finish(ax, title_of(run, what), label("entropy"))
    ax.set_ylim(bottom=0.0)
    return ax


def entropy_against_floor(
    run: RunTables | pd.DataFrame,
    floor: str = "floor_row",
    *,
    step: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Every head as a point: its entropy over its floor, the bound itself as a line.

    How far above the line a head lies is how little the floor says about it. No point can lie below the line
    of a true floor but by rounding; one that did would be a fault of the reading. `floor_paper` is no floor,
    and points may lie anywhere.

    Args:
        run: a run as `load_run` returns it, or a table as `measure` returns it.
        floor: `floor_row`, `floor_activation`, `floor_weights` or `floor_paper`.
        step: the measured step to show; of several runs' steps the last one up to it. None: the last at which
            the floor is known.
        ax: where to draw; None makes a figure, the axes' `figure`.

    Raises:
        ConfigurationError: there is no such floor, or nothing was measured up to `step`.
    """
    columns = [column for column, *_ in _FLOORS]
    if floor not in columns:
        raise ConfigurationError(f"floor is {floor!r}; there are {', '.join(columns)}")
    ax = canvas.axes_on(ax, 4.6, 3.4)
    table, name = heads_of(run)
    known = table[finite(table[floor]).notna() & finite(table["entropy"]).notna()]
    at, rows = at_step(known, step)
    drawn = not rows.empty
    if drawn:
        top = float(max(finite(rows["max_entropy"]).max(), finite(rows["entropy"]).max())) or 1.0
        ax.plot([0.0, top], [0.0, top], color=style.QUIET, linewidth=1.0, label="entropy = floor")
        ax.axhline(top, color=style.QUIET, linestyle=":", label="maximum, log n")
        _points(ax, rows, floor)
        ax.set_xlim(-0.03 * top, 1.03 * top)
        ax.set_ylim(0.0, 1.06 * top)
    else:
        style.say(ax, NOTHING if table.empty else f"{symbol(floor)} is not known in this run")
    when = f" at step {at}" if drawn and table["step"].nunique() > 1 else ""
    what = f"entropy of every head over its {symbol(floor)}{when}"
    style.dress(ax, f"{name}: {what}" if name else what, label("entropy"), xlabel=label(floor))
    style.legend_outside(ax, "layer")
    return ax


def _points(ax: Axes, rows: pd.DataFrame, floor: str) -> None:
    """A point per head, coloured by depth; of many layers the legend names the first and the last."""
    names = layer_names(rows)
    labelled = set(range(len(names))) if len(names) <= 8 else {0, len(names) - 1}
    shown = zip(names, style.short(names), style.depth_colours(len(names)), strict=True)
    for i, (name, text, colour) in enumerate(shown):
        of_layer = rows[rows["layer"] == name]
        ax.scatter(
            finite(of_layer[floor]),
            finite(of_layer["entropy"]),
            s=16,
            color=[colour],
            edgecolors="white",
            linewidths=0.4,
            label=text if i in labelled else None,
            zorder=3,
        )


def _choose(heads: pd.DataFrame, layer: str | None, head: int | None, call: int) -> tuple[str, int, int]:
    """The head that is meant: what was left open is that of the lowest share of its maximum."""
    if layer is None and head is not None:
        raise ConfigurationError(f"head is {head} and layer is None; say of which layer")
    if layer is not None and head is not None:
        return layer, head, call
    among = heads if layer is None else heads[(heads["layer"] == layer) & (heads["call"] == call)]
    lowest = lowest_head(among)
    return lowest if lowest is not None else (layer or "", head or 0, call)
