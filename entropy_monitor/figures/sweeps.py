"""What became of the runs of a sweep, over the hyperparameter that was varied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.ticker import NullLocator

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.figures import canvas, style
from entropy_monitor.figures.several import as_runs
from entropy_monitor.frames import SHARE, RunTables, finite, scalar, with_share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

_MOST_TICKS = 7
_LAST_VALUES = 10
"""Recorded values whose mean is how a run ended: one batch alone is noise."""


@dataclass(frozen=True)
class End:
    """How a run ended.

    Attributes:
        metric: mean of the last ten recorded values; NaN where one of them is not finite, or none is there.
        share: mean over heads of entropy / maximum at the last measured step.
        lowest: the lowest head at that step.
        highest: the highest head at that step.
        severe: whether a severe alert opened in the run.
    """

    metric: float
    share: float
    lowest: float
    highest: float
    severe: bool


def sweep(
    runs: RunTables | Sequence[RunTables],
    values: Sequence[float] | str,
    *,
    name: str | None = None,
    metric: str = "loss",
    groups: Sequence[str] | None = None,
    axes: Sequence[Axes] | None = None,
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """How runs ended over a hyperparameter: their loss above, what is left of the entropy below.

    A point is a run: the mean of the last ten values of its metric; the mean of entropy / maximum over its
    heads at the last measured step, with a bar from the lowest head to the highest. Runs in which a severe
    alert opened are crosses, all others discs. A run whose metric did not end as a number stands at the upper
    edge.

    Args:
        runs: runs as `load_run` returns them.
        values: the hyperparameter's value in each run; or the name of a scalar that the runs recorded, of
            which the largest value counts, such as that of a learning rate after its warmup.
        name: of the hyperparameter, for the axis; None: `values` if that is a name.
        metric: the scalar of the upper panel.
        groups: a second choice that was varied: a line and a colour for each.
        axes: two axes to draw on.
        figure: an empty figure to draw on, instead of axes; None makes one.

    Returns:
        The figure, with two axes.

    Raises:
        ConfigurationError: there are no runs, not one value or group for each, a run has no scalar of that
            name, or there are not two axes.
    """
    given = as_runs(runs)
    places = _places(given, values)
    if groups is not None and len(groups) != len(given):
        raise ConfigurationError(
            f"groups names {len(groups)} groups for {len(given)} runs; give one for each"
        )
    labels = list(groups) if groups is not None else [""] * len(given)
    figure, (top, share) = canvas.panels((2, 1), axes, figure, (canvas.DOUBLE_COLUMN, 4.4), sharex=True)
    ends = [_end(run, metric) for run in given]
    decades = min(places) > 0 and max(places) >= 10 * min(places)
    order = list(dict.fromkeys(labels))
    for i, group in enumerate(order):
        # Bars of one value of several groups stand beside each other.
        aside = 0.012 * (i - (len(order) - 1) / 2)
        colour = style.OKABE_ITO[i % len(style.OKABE_ITO)]
        of_group = [k for k, label in enumerate(labels) if label == group]
        of_group.sort(key=places.__getitem__)
        xs, ys = [places[k] for k in of_group], [ends[k] for k in of_group]
        if decades:
            xs = [x * (max(places) / min(places)) ** aside for x in xs]
        else:
            xs = [x + (max(places) - min(places)) * aside for x in xs]
        _draw(top, share, xs, ys, colour, style.plain(group))
    whole = [end.metric for end in ends if np.isfinite(end.metric) and end.metric > 0]
    if whole and max(whole) > 30 * min(whole):
        top.set_yscale("log")
    if decades:
        share.set_xscale("log")
        top.set_xscale("log")
    if len(set(places)) <= _MOST_TICKS:
        share.set_xticks(sorted(set(places)), [f"{x:g}" for x in sorted(set(places))])
        share.xaxis.set_minor_locator(NullLocator())
    _legend_of_marks(share)
    axis = style.plain(name if name is not None else values if isinstance(values, str) else "hyperparameter")
    what = style.plain(metric)
    style.dress(top, f"{what} at the end: mean of the last {_LAST_VALUES} values", what, xlabel="")
    title = "entropy / maximum at the end: mean over heads, lowest to highest head"
    style.dress(share, title, "share", xlabel=axis)
    share.set_ylim(0.0, 1.03)
    style.legend_outside(share if style.narrow(share) else top, of=share)
    return canvas.whole(figure)


def _places(runs: Sequence[RunTables], values: Sequence[float] | str) -> list[float]:
    if isinstance(values, str):
        largest = [finite(scalar(run, values)).max() for run in runs]
        for run, value in zip(runs, largest, strict=True):
            if not np.isfinite(value):
                raise ConfigurationError(
                    f"run {run.name!r} recorded no scalar {values!r}; give numbers, one for each run"
                )
        return [float(value) for value in largest]
    if len(values) != len(runs):
        raise ConfigurationError(
            f"values holds {len(values)} numbers for {len(runs)} runs; give one for each"
        )
    return [float(value) for value in values]


def _end(run: RunTables, metric: str) -> End:
    last = scalar(run, metric).iloc[-_LAST_VALUES:]
    mean = float(last.mean()) if len(last) and np.isfinite(last).all() else float("nan")
    heads = with_share(run.heads)
    shares = heads.loc[heads["step"] == heads["step"].max(), SHARE]
    severe = bool((run.alerts["severity"] == "severe").any()) if len(run.alerts) else False
    return End(mean, float(shares.mean()), float(shares.min()), float(shares.max()), severe)


def _draw(
    top: Axes, share: Axes, places: Sequence[float], ends: Sequence[End], colour: str, group: str
) -> None:
    look: dict[str, Any] = {"color": colour, "linewidth": 0.9, "alpha": 0.6, "zorder": 2}
    top.plot(places, [end.metric for end in ends], **look)
    share.plot(places, [end.share for end in ends], label=group or None, **look)
    for x, end in zip(places, ends, strict=True):
        dot: dict[str, Any] = {**_mark(severe=end.severe), "color": colour, "zorder": 3}
        share.plot([x, x], [end.lowest, end.highest], color=colour, linewidth=1.4, alpha=0.45, zorder=1)
        share.plot([x], [end.share], **dot)
        if np.isfinite(end.metric):
            top.plot([x], [end.metric], **dot)
        else:
            top.plot([x], [0.97], transform=top.get_xaxis_transform(), **dot)


def _mark(*, severe: bool) -> dict[str, Any]:
    return {"marker": "X" if severe else "o", "markersize": 6.5 if severe else 5.0, "markeredgewidth": 0.0}


def _legend_of_marks(ax: Axes) -> None:
    for severe, label in ((False, "no severe alert"), (True, "a severe alert opened")):
        ax.plot([], [], linestyle="none", color=style.QUIET, label=label, **_mark(severe=severe))
