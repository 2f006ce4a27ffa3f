"""Layers × heads at one step."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.figures import canvas, style
from entropy_monitor.figures.images import colour_bar, norm_of
from entropy_monitor.figures.labels import label, symbol
from entropy_monitor.figures.lines import NOTHING
from entropy_monitor.figures.tables import at_step, heads_of
from entropy_monitor.frames import SHARE, RunTables, finite, layer_names, with_share
from entropy_monitor.records import HEADS, SEVERITIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_LABELS = 24
_INCHES_OF_A_NUMBER = 0.27


def heads_map(
    run: RunTables | pd.DataFrame,
    column: str = SHARE,
    *,
    step: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """One column of the heads table at a step: a row per layer in order of execution, a cell per head.

    Values are written into the cells where there is room. Heads under an alert that is open at that step are
    framed in the colour of its severity; grey cells are not known, or heads that a layer does not have.

    Args:
        run: a run as `load_run` returns it, or a table as `measure` returns it.
        column: `entropy_share` (entropy over its maximum: dark is sharp), or a numeric column of `heads`.
        step: the measured step to show, or the last one before it; None: the last. Of these, those count at
            which the column is known.
        ax: where to draw; None makes a figure, the axes' `figure`.

    Raises:
        ConfigurationError: the heads table has no such column, or the column was not read up to `step`.
    """
    table, name = heads_of(run)
    numeric = [
        c.name for c in HEADS.columns if c.dtype != "str" and c.name not in (*HEADS.key, "layer_index")
    ]
    if column != SHARE and column not in numeric:
        raise ConfigurationError(
            f"column is {column!r}; a map of heads can show {SHARE}, {', '.join(numeric)}"
        )
    values = finite(with_share(table)[SHARE] if column == SHARE else table[column])
    # What is never null is read in every measured step, and grey means that it was not finite there.
    unread = column != SHARE and HEADS[column].nullable
    table = table.assign(value=values)
    at, _ = at_step(table[values.notna()] if unread else table, step)
    grid = _grid(table[table["step"] == at])
    ax = canvas.axes_on(ax, *_size(grid))
    ax.set_facecolor(style.NOT_KNOWN)
    if grid.empty:
        style.say(ax, NOTHING if table.empty else f"{symbol(column)} is not known in this run")
    else:
        _paint(ax, grid, column)
        if not grid.notna().to_numpy().any():
            style.say(ax, f"{symbol(column)} is not finite")
        if not isinstance(run, pd.DataFrame):
            _frame_alerts(ax, grid, run.alerts, at)
    when = f" at step {at}" if not grid.empty and table["step"].nunique() > 1 else ""
    what = f"{symbol(column)} of every head{when}"
    longest = max((len(text.get_text()) for text in ax.get_yticklabels()), default=0)
    title = f"{name}: {what}" if name else what
    style.dress(ax, title, "layer", xlabel="head", beside=0.35 + 0.055 * longest)
    ax.grid(visible=False)
    style.integer_steps(ax)
    style.legend_outside(ax)
    return ax


def _grid(rows: pd.DataFrame) -> pd.DataFrame:
    """A row per (layer, call), a column per head."""
    if rows.empty:
        return pd.DataFrame()
    rank = {name: i for i, name in enumerate(layer_names(rows))}
    keys = rows.assign(rank=rows["layer"].map(rank).astype("int64"))
    grid = keys.groupby(["rank", "call", "head"])["value"].mean().unstack("head")
    grid = grid.reindex(columns=range(int(rows["head"].max()) + 1))
    names = list(rank)
    grid.index = pd.MultiIndex.from_tuples(
        [(names[i], call) for i, call in grid.index], names=["layer", "call"]
    )
    return grid


def _size(grid: pd.DataFrame) -> tuple[float, float]:
    rows, columns = grid.shape if not grid.empty else (4, 4)
    return min(canvas.DOUBLE_COLUMN, max(3.6, 2.2 + 0.3 * columns)), min(8.0, max(2.0, 1.0 + 0.24 * rows))


def _paint(ax: Axes, grid: pd.DataFrame, column: str) -> None:
    values = np.ma.masked_invalid(grid.to_numpy(dtype=np.float64))
    norm = norm_of(values, column)
    rows, columns = values.shape
    edges = np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5
    mesh = ax.pcolormesh(*edges, values, cmap=colormaps["viridis"], norm=norm, rasterized=values.size > 2000)
    ax.set_xlim(-0.5, columns - 0.5)
    ax.set_ylim(rows - 0.5, -0.5)
    every = -(-rows // _MOST_LABELS)
    calls = grid.index.get_level_values("call")
    names = style.short([str(name) for name in grid.index.get_level_values("layer")])
    texts = [f"{name}, call {call}" if call else name for name, call in zip(names, calls, strict=True)]
    ax.set_yticks(np.arange(rows)[::every], texts[::every])
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.tick_params(length=0)
    cell = style.room(ax) * 0.62 / columns
    height = float(ax.figure.bbox.height / ax.figure.dpi) * 0.7 / rows
    if cell >= _INCHES_OF_A_NUMBER and height >= 0.14:
        _write(ax, values, norm)
    colour_bar(ax, mesh, label(column))


def _write(ax: Axes, values: np.ma.MaskedArray[Any, Any], norm: Any) -> None:
    for row, column in zip(*np.nonzero(~np.ma.getmaskarray(values)), strict=True):
        value = float(values[row, column])
        text = (
            f"{value:.2f}" if abs(value) < 9.95 else f"{value:.0f}" if abs(value) < 1000 else f"{value:.0e}"
        )
        light = float(norm(value)) > 0.55
        colour = style.INK if light else "white"
        ax.text(column, row, text, ha="center", va="center", fontsize=6.5, color=colour)


def _frame_alerts(ax: Axes, grid: pd.DataFrame, alerts: pd.DataFrame, step: int) -> None:
    if alerts.empty:
        return
    still = alerts["closed"].isna() | (alerts["closed"] > step).fillna(value=True)
    here = alerts[(alerts["opened"] <= step) & still]
    layers = grid.index.get_level_values("layer")
    worst: dict[tuple[int, int], str] = {}
    for severity in SEVERITIES:
        of_severity = here[here["severity"] == severity]
        for layer, heads in zip(of_severity["layer"], of_severity["heads"], strict=True):
            places = itertools.product(np.flatnonzero(layers == layer).tolist(), heads)
            worst |= {(row, head): severity for row, head in places if 0 <= head < grid.shape[1]}
    named: set[str] = set()
    for (row, head), found in worst.items():
        colour = style.SEVERITY_COLOURS[found]
        look: dict[str, Any] = {"fill": False, "linewidth": 1.6, "edgecolor": colour}
        text = "" if found in named else f"{found} alert"
        ax.add_patch(Rectangle((head - 0.46, row - 0.44), 0.92, 0.88, **look, label=text))
        named.add(found)
