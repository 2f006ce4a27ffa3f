"""One look for all figures: colours that colour-blind readers can tell apart, quiet axes.

Only matplotlib's object interface is used: no pyplot, no rcParams, so that a user's own style and
current figure stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

# Okabe and Ito's palette, without its yellow, which is too pale for lines on white.
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
SEVERITY_COLOURS = {"severe": "#D55E00", "warning": "#E69F00", "info": "#0072B2"}
DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
INK = "#2b2f36"
QUIET = "#8a9099"
GRID = "#e6e8eb"
NOT_KNOWN = "#d4d7db"
LONGEST_NAME = 26


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in inches that arranges itself; pyplot does not know of it."""
    return Figure(figsize=(width, height), layout="constrained")


def axes_on(ax: Axes | None, width: float = 8.6, height: float = 3.4) -> Axes:
    """`ax`, or the only axes of a new figure."""
    return ax if ax is not None else new_figure(width, height).subplots()


def depth_colours(count: int) -> list[tuple[float, float, float, float]]:
    """One colour per layer, dark first and light last: depth has an order, and viridis shows it."""
    shades = np.linspace(0.0, 0.88, max(count, 1)) if count > 1 else np.array([0.25])
    return [colormaps["viridis"](float(shade)) for shade in shades[:count]]


def plain(text: object) -> str:
    r"""Text drawn as it is: `$` starts no formula, and `_` in front hides no legend entry."""
    cleaned = "".join(c if c.isprintable() else " " for c in str(text)).replace("$", r"\$")
    return f" {cleaned}" if cleaned.startswith("_") else cleaned


def short(names: Sequence[str]) -> list[str]:
    """Names cut in front to `LONGEST_NAME` characters; kept whole where two would read the same."""
    cut = [name if len(name) <= LONGEST_NAME else "…" + name[-(LONGEST_NAME - 1) :] for name in names]
    return [plain(c if cut.count(c) == 1 else name) for c, name in zip(cut, names, strict=True)]


def dress(ax: Axes, title: str, ylabel: str, *, xlabel: str = "training step") -> None:
    """Labels, a quiet grid, and no box."""
    ax.set_title(title, loc="left", fontsize=10, color=INK)
    ax.set_ylabel(ylabel, fontsize=9, color=INK)
    ax.set_xlabel(xlabel, fontsize=9, color=INK)
    ax.tick_params(labelsize=8, colors=INK)
    ax.grid(visible=True, color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(QUIET)


def integer_steps(ax: Axes) -> None:
    """Ticks at whole steps, however few there are."""
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1, steps=[1, 2, 5, 10]))


def lone_dots(values: pd.Series) -> dict[str, Any]:
    """What `plot` is told so that points without a neighbour, which no line would show, are dots."""
    there = np.concatenate([[False], values.notna().to_numpy(), [False]])
    lone = np.flatnonzero(there[1:-1] & ~there[:-2] & ~there[2:])
    return {"marker": "o", "markevery": lone.tolist()} if len(lone) else {}


def say(ax: Axes, text: str) -> None:
    """Text in the middle of axes that have nothing to draw."""
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", fontsize=9, color=QUIET)


def note(ax: Axes, text: str) -> None:
    """A remark above the right end of the axes; nothing for an empty one."""
    if text:
        ax.set_title(text, loc="right", fontsize=8, color=QUIET, style="italic")


def mark_broken(ax: Axes, steps: Sequence[int]) -> None:
    """A row of crosses at the foot of the axes: here the values were NaN or infinite."""
    if steps:
        ax.plot(
            list(steps),
            [0.03] * len(steps),
            linestyle="none",
            marker="x",
            markersize=4,
            color=SEVERITY_COLOURS["severe"],
            transform=ax.get_xaxis_transform(),
            label="not finite",
        )


def legend_beside(ax: Axes, title: str = "", *, of: Axes | None = None) -> None:
    """A legend to the right of the axes, where it covers no data; of other axes' lines if given."""
    handles, labels = (of or ax).get_legend_handles_labels()
    if handles:
        box = ax.legend(
            handles,
            labels,
            title=title or None,
            loc="upper left",
            bbox_to_anchor=(1.01, 1.0),
            borderaxespad=0.0,
            frameon=False,
            fontsize=8,
            title_fontsize=8,
            labelcolor=INK,
            alignment="left",
        )
        box.get_title().set_color(QUIET)
