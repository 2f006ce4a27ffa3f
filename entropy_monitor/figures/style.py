"""One look for all figures: colours that colour-blind readers can tell apart, quiet axes.

Only matplotlib's object interface is used: no pyplot, no rcParams, so that a user's own style and
current figure stay as they are. What is drawn follows the room: in axes as narrow as a journal's
column, text is smaller, titles break, and legends lie below instead of beside the axes.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

# Okabe and Ito's palette, without its yellow, which is too pale for lines on white.
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
SEVERITY_COLOURS = {"severe": "#D55E00", "warning": "#E69F00", "info": "#0072B2"}
DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
INK = "#2b2f36"
QUIET = "#6b727c"
GRID = "#e6e8eb"
NOT_KNOWN = "#d4d7db"
LONGEST_NAME = 26

_MOST_CROSSES = 300

_NARROW = 5.0
"""Inches of a figure for one axes below which a legend beside it would leave the data too little room."""


def room(ax: Axes) -> float:
    """Inches that the figure has for these axes, with their labels."""
    width = float(ax.figure.bbox.width / ax.figure.dpi)
    place = ax.get_subplotspec()
    if place is None:
        return width * float(ax.get_position().width)
    grid = place.get_topmost_subplotspec()
    return width * len(grid.colspan) / grid.get_gridspec().ncols


def narrow(ax: Axes) -> bool:
    """Whether the axes are as narrow as a journal's column."""
    return room(ax) < _NARROW


def depth_colours(count: int) -> list[tuple[float, float, float, float]]:
    """One colour per layer, dark first and light last: depth has an order, and viridis shows it."""
    shades = np.linspace(0.0, 0.8, max(count, 1)) if count > 1 else np.array([0.25])
    return [colormaps["viridis"](float(shade)) for shade in shades[:count]]


def plain(text: object) -> str:
    r"""Text drawn as it is: `$` starts no formula, and `_` in front hides no legend entry."""
    cleaned = "".join(c if c.isprintable() else " " for c in str(text)).replace("$", r"\$")
    return f" {cleaned}" if cleaned.startswith("_") else cleaned


def short(names: Sequence[str]) -> list[str]:
    """Names cut in front to `LONGEST_NAME` characters; kept whole where two would read the same."""
    cut = [name if len(name) <= LONGEST_NAME else "…" + _end(name) for name in names]
    return [plain(c if cut.count(c) == 1 else name) for c, name in zip(cut, names, strict=True)]


def _end(name: str) -> str:
    """The end of a name, from the beginning of one of its parts where one begins soon."""
    end = name[-(LONGEST_NAME - 1) :]
    part = end.find(".")
    return end[part + 1 :] if 0 <= part < LONGEST_NAME // 3 else end


def dress(
    ax: Axes,
    title: str,
    ylabel: str,
    *,
    xlabel: str = "training step",
    remark: str = "",
    beside: float = 0.6,
) -> None:
    """Labels, a quiet grid, and no box; a remark for the reader between title and axes.

    Args:
        ax: the axes.
        title: above them, broken into lines that fit.
        ylabel: what is drawn, with its unit.
        xlabel: over what.
        remark: small, below the title.
        beside: inches left of the axes that labels take.
    """
    small = narrow(ax)
    characters = max(8, int((room(ax) - beside) * (14 if small else 12)))
    lines = textwrap.wrap(remark, int(characters * 1.2))
    size = 7 if small else 8
    wrapped = "\n".join(textwrap.wrap(title, characters)) if len(title) > characters else title
    ax.set_title(
        wrapped, loc="left", fontsize=8.5 if small else 10, color=INK, pad=5 + 1.35 * size * len(lines)
    )
    if lines:
        ax.annotate(
            "\n".join(lines),
            (0.0, 1.0),
            (0.0, 3.0),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=size,
            color=QUIET,
            style="italic",
        )
    ax.set_ylabel(ylabel, fontsize=8 if small else 9, color=INK)
    ax.set_xlabel(xlabel, fontsize=8 if small else 9, color=INK)
    ax.tick_params(labelsize=7 if small else 8, colors=INK)
    ax.grid(visible=True, color=GRID, linewidth=0.6 if small else 0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(QUIET)


def integer_steps(ax: Axes) -> None:
    """Ticks at whole steps, however few there are."""
    most = 3 if room(ax) < 2.0 else 5 if narrow(ax) else 8
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=most, min_n_ticks=1, steps=[1, 2, 5, 10]))


def line_width(ax: Axes) -> float:
    """Points of a line that is to be read."""
    return 1.2 if narrow(ax) else 1.6


def lone_dots(values: pd.Series) -> dict[str, Any]:
    """What `plot` is told so that points without a neighbour, which no line would show, are dots."""
    there = np.concatenate([[False], values.notna().to_numpy(), [False]])
    lone = np.flatnonzero(there[1:-1] & ~there[:-2] & ~there[2:])
    return {"marker": "o", "markersize": 4, "markevery": lone.tolist()} if len(lone) else {}


def say(ax: Axes, text: str) -> None:
    """Text in the middle of axes that have nothing to draw."""
    wrapped = textwrap.fill(text, int(room(ax) * 11))
    ax.text(0.5, 0.5, wrapped, transform=ax.transAxes, ha="center", va="center", fontsize=8.5, color=QUIET)


def mark_broken(ax: Axes, steps: Sequence[int]) -> None:
    """A row of crosses at the foot of the axes: here the values were NaN or infinite."""
    if steps:
        shown = list(steps)[:: -(-len(steps) // _MOST_CROSSES)]
        ax.plot(
            shown,
            [0.03] * len(shown),
            linestyle="none",
            marker="x",
            markersize=4,
            color=SEVERITY_COLOURS["severe"],
            transform=ax.get_xaxis_transform(),
            label="not finite",
        )


def legend_outside(ax: Axes, title: str = "", *, of: Axes | None = None) -> None:
    """A legend that covers no data: right of the axes, or below narrow ones.

    In a figure that does not arrange itself there is no room kept outside of axes: there it lies within.

    Args:
        ax: whose legend it is.
        title: over the entries.
        of: axes whose lines are named; None for `ax` itself.
    """
    handles, labels = (of or ax).get_legend_handles_labels()
    if not handles:
        return
    small = narrow(ax)
    look: dict[str, Any] = {
        "title": title or None,
        "fontsize": 7 if small else 8,
        "title_fontsize": 7 if small else 8,
        "labelcolor": INK,
        "alignment": "left",
        "frameon": False,
    }
    if ax.figure.get_layout_engine() is None:
        look |= {"loc": "best", "frameon": True, "framealpha": 0.8, "edgecolor": "none"}
    elif small:
        # A fixed distance below the axes: tick labels and the axis' own label are as high in any figure.
        inches = 0.37 if ax.get_xlabel() else 0.12
        below = ax.transAxes + ScaledTranslation(0, -inches, ax.figure.dpi_scale_trans)
        longest = max(len(label) for label in labels)
        fitting = int(room(ax) * 0.85 / (0.36 + 0.055 * longest))
        look |= {
            "loc": "upper left",
            "bbox_to_anchor": (-0.02, 0.0),
            "bbox_transform": below,
            "ncols": max(1, min(fitting, len(labels), 4)),
            "handlelength": 1.6,
            "columnspacing": 1.2,
            "labelspacing": 0.3,
        }
    else:
        look |= {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0)}
    box = ax.legend(handles, labels, borderaxespad=0.0, **look)
    box.get_title().set_color(QUIET)


def legend_of_figure(figure: Figure | SubFigure, axes: Sequence[Axes], title: str) -> None:
    """One legend below all axes, each entry once; within the last axes where no room can be kept below."""
    entries: dict[str, Any] = {}
    for ax in axes:
        for handle, name in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(name, handle)
    if not entries:
        return
    if figure.get_layout_engine() is None:
        legend_outside(axes[-1], title)
        return
    width = float(figure.bbox.width / figure.dpi)
    longest = max(len(name) for name in entries)
    box = figure.legend(
        list(entries.values()),
        list(entries),
        title=title,
        loc="outside lower center",
        ncols=max(1, min(len(entries), int(width / (0.5 + 0.06 * longest)))),
        frameon=False,
        fontsize=7.5,
        title_fontsize=7.5,
        labelcolor=INK,
    )
    box.get_title().set_color(QUIET)
