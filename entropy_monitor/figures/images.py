"""Pictures of many values at once: layers and heads over training, attention maps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import MaxNLocator

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.figures import canvas, style
from entropy_monitor.figures.labels import label, low_is_bad, spans_decades, symbol
from entropy_monitor.figures.lines import NOTHING, title_of
from entropy_monitor.frames import SHARE, RunTables, column_of, layer_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_ROWS = 256
"""Rows from which one row per layer is drawn: below two pixels a head cannot be seen."""

_MOST_COLUMNS = 600
_MOST_LABELS = 24


def heatmap(run: RunTables, column: str = SHARE, *, ax: Axes | None = None) -> Axes:
    """One column of the tables as colour: every head of every layer a row, steps as columns.

    With more than 256 rows a layer is one row: the lowest value of its heads for entropies and
    floors, the largest for everything else. A step at which a column is not known, and was and will
    be, has the colour of the nearest at which it is.

    Args:
        run: a run as `load_run` returns it.
        column: `entropy_share` (entropy over its maximum: dark is sharp), or a numeric column of
            `heads` or `layers`.
        ax: where to draw; None makes a figure, the axes' `figure`.

    Raises:
        ConfigurationError: no table has that column.
    """
    table = column_of(run, column)
    grid, remark = _grid(table, lowest=low_is_bad(column))
    height = min(8.0, max(2.4, 1.1 + 0.1 * len(grid)))
    ax = canvas.axes_on(ax, height=height)
    ax.set_facecolor(style.NOT_KNOWN)
    if grid.empty or not grid.notna().to_numpy().any():
        style.say(ax, NOTHING if grid.empty else f"{symbol(column)} is not known in this run")
    else:
        _paint(ax, grid, column)
    of_heads = "head" in table.columns
    what = f"{symbol(column)} of every {'head' if of_heads else 'layer'}"
    ylabel = "layer, heads from 0 down" if of_heads else "layer"
    longest = max((len(text.get_text()) for text in ax.get_yticklabels()), default=0)
    style.dress(ax, title_of(run, what), ylabel, remark=remark, beside=0.35 + 0.055 * longest)
    ax.grid(visible=False)
    style.integer_steps(ax)
    return ax


def attention_map(values: Any, ax: Axes | None = None, *, title: str = "attention map") -> Axes:
    """One head's attention map, queries down and keys across, the largest weight brightest.

    Args:
        values: rows of weights `[Tq, Tk]`, as `capture` keeps them and as an alert's `evidence["map"]` holds
            them.
        ax: where to draw; None makes a figure, the axes' `figure`.
        title: above it.

    Raises:
        ValueError: `values` is not a matrix of numbers.
    """
    matrix = np.asarray([list(row) for row in values], dtype=np.float64)
    if matrix.ndim != 2 or not matrix.size:
        raise ValueError(f"an attention map is a matrix of numbers; this one has shape {matrix.shape}")
    ax = canvas.axes_on(ax, 2.9, 2.6)
    shown = np.ma.masked_invalid(matrix)
    top = float(shown.max()) if shown.count() else 1.0
    image = ax.imshow(shown, cmap="cividis", norm=Normalize(0.0, top or 1.0), interpolation="nearest")
    style.dress(ax, style.plain(title), "query", xlabel="key")
    ax.grid(visible=False)
    style.integer_steps(ax)
    ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    # Within the axes' own box: a square map is less high than the room that it was given.
    colour_bar(ax, image, "weight", cax=ax.inset_axes((1.04, 0.0, 0.05, 1.0)))
    return ax


def alert_map(run: RunTables, alert: int = 0, *, ax: Axes | None = None) -> Axes:
    """The attention map that was stored with an alert: its worst head when it was last measured.

    Args:
        run: a run as `load_run` returns it.
        alert: which row of `run.alerts`, from 0.
        ax: where to draw; None makes a figure, the axes' `figure`.

    Raises:
        ConfigurationError: the run has no such alert, or no map was stored with it.
    """
    count = len(run.alerts)
    if not -count <= alert < count:
        raise ConfigurationError(f"alert is {alert}; run {run.name!r} has {count} alerts, counted from 0")
    row = run.alerts.iloc[alert]
    evidence = row["evidence"] or {}
    if evidence.get("map") is None:
        raise ConfigurationError(f"no attention map was stored with alert {alert} of run {run.name!r}")
    where = f"{row['layer']}, head {evidence.get('worst_head', '?')}"
    return attention_map(evidence["map"], ax=ax, title=where)


def _grid(table: pd.DataFrame, *, lowest: bool) -> tuple[pd.DataFrame, str]:
    """A row per (layer, call, head) in order of execution, a column per step; and a remark."""
    if table.empty:
        return pd.DataFrame(), ""
    rank = {name: i for i, name in enumerate(layer_names(table))}
    keys = pd.DataFrame(
        {
            "rank": table["layer"].map(rank).astype("int64"),
            "call": table["call"] if "call" in table.columns else 0,
            "head": table["head"] if "head" in table.columns else 0,
            "step": table["step"],
            "value": table["value"],
            "known": table["known"],
        }
    )
    everything = bool(table["known"].all())
    remarks = []
    how = "min" if lowest else "max"
    rows = ["rank", "call", "head"]
    if len(keys[rows].drop_duplicates()) > _MOST_ROWS:
        rows = ["rank"]
        remarks.append(f"a row per layer: its {'lowest' if lowest else 'largest'} head")
    steps = np.unique(keys["step"].to_numpy())
    stride = -(-len(steps) // _MOST_COLUMNS)
    shown = steps[::stride]
    if stride > 1:
        remarks.append(f"1 of {stride} measured steps")
    # Thinned before the gaps are closed, a column read in every fourth step could be left with none.
    if everything and stride > 1:
        keys = keys[keys["step"].isin(shown)]
    grid = keys.groupby([*rows, "step"])["value"].agg(how).unstack("step")
    if not everything:
        known = keys.groupby([*rows, "step"])["known"].any().unstack("step", fill_value=False)
        grid = _between(grid, known.to_numpy(dtype=bool))[shown]
    names = list(rank)
    ranks = grid.index.get_level_values("rank")
    grid.index = pd.Index([names[i] for i in ranks], name="layer")
    return grid, "; ".join(remarks)


def _between(grid: pd.DataFrame, known: npt.NDArray[np.bool_]) -> pd.DataFrame:
    """Each row with its gaps closed by the nearest known step's value; what lies outside stays as it is."""
    steps = grid.columns.to_numpy(dtype=np.float64)
    closed = grid.to_numpy(dtype=np.float64, copy=True)
    for row, there in zip(closed, known, strict=True):
        places = np.flatnonzero(there)
        if len(places) < 2:
            continue
        borders = (steps[places[1:]] + steps[places[:-1]]) / 2
        inside = slice(places[0], places[-1] + 1)
        row[inside] = row[places[np.searchsorted(borders, steps[inside])]]
    return pd.DataFrame(closed, index=grid.index, columns=grid.columns)


def _paint(ax: Axes, grid: pd.DataFrame, column: str) -> None:
    values = np.ma.masked_invalid(grid.to_numpy(dtype=np.float64))
    mesh = ax.pcolormesh(
        _edges(grid.columns.to_numpy(dtype=np.float64)),
        np.arange(len(grid) + 1, dtype=np.float64),
        values,
        cmap=colormaps["viridis"],
        norm=norm_of(values, column),
        rasterized=True,
    )
    ax.set_ylim(len(grid), 0)
    names = grid.index.to_numpy()
    starts = np.flatnonzero(np.concatenate([[True], names[1:] != names[:-1]]))
    ends = np.append(starts[1:], len(grid))
    every = -(-len(starts) // _MOST_LABELS)
    ax.set_yticks((starts + ends)[::every] / 2, style.short([str(n) for n in names[starts[::every]]]))
    ax.tick_params(axis="y", length=0)
    if len(starts) <= _MOST_LABELS and len(grid) > len(starts):
        ax.hlines(starts[1:], *ax.get_xlim(), color="white", linewidth=1.2)
    colour_bar(ax, mesh, label(column))


def norm_of(values: np.ma.MaskedArray[Any, Any], column: str) -> Normalize:
    """The colour scale of a column: 0 to 1 for shares, logarithmic for norms that differ."""
    if column == SHARE or not values.count():
        return Normalize(0.0, 1.0)
    low, high = float(values.min()), float(values.max())
    if spans_decades(column) and 0 < low < high:
        return LogNorm(low, high)
    return Normalize(low, high if high > low else low + 1.0)


def _edges(steps: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Borders half-way between steps, so that an uneven schedule is drawn to scale."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middle = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middle[0]], middle, [2 * steps[-1] - middle[-1]]])


def colour_bar(ax: Axes, mappable: Any, text: str, *, cax: Axes | None = None) -> None:
    """A scale beside the axes, or on axes of its own."""
    small = style.narrow(ax)
    room: dict[str, Any] = {"ax": ax, "pad": 0.02} if cax is None else {"cax": cax}
    bar = ax.figure.colorbar(mappable, **room)
    bar.set_label(text, fontsize=7.5 if small else 8, color=style.INK)
    bar.ax.tick_params(which="both", labelsize=7 if small else 8, colors=style.INK)
    bar.outline.set_visible(False)
