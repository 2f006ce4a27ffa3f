"""The figures of "Stabilizing Transformer Training by Preventing Attention Entropy Collapse" for any run.

Zhai et al., ICML 2023 (https://proceedings.mlr.press/v202/zhai23a.html). What the paper calls the
attention weight matrix is W_K W_Qᵀ of a head; its largest singular value is the column `sigma_qk`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from entropy_monitor.figures import canvas, style
from entropy_monitor.figures.labels import label
from entropy_monitor.figures.layers import draw_entropy
from entropy_monitor.figures.lines import NOTHING, draw_series
from entropy_monitor.figures.several import (
    Look,
    as_runs,
    draw_largest,
    draw_run,
    layer_of,
    looks_of,
    mean_known,
    say_if_empty,
    values_of,
)
from entropy_monitor.frames import RunTables, choose_layers, column_of, scalar

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

_MOST_COLUMNS = 4


def paper_figure_1(
    runs: RunTables | Sequence[RunTables],
    layers: Iterable[str] | None = None,
    *,
    axes: Sequence[Axes] | None = None,
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """Loss above and attention entropy of three layers below, a column for each run, on common axes.

    The paper's Figure 1 has four runs of one model: learning rate and warmup differ. A dip of the entropy
    goes with a stalled or diverging loss.

    Args:
        runs: a run as `load_run` returns it, or several; more than four go on in further rows.
        layers: names of the layers to draw, those that a run has; None: the first, the middle and the last.
        axes: two axes for each run: loss and entropy of the first, of the second, ….
        figure: an empty figure to draw on, instead of axes; None makes one.

    Returns:
        The figure.

    Raises:
        ConfigurationError: there are no runs, no run has a layer of that name, or not two axes a run.
    """
    given = as_runs(runs)
    wanted = None if layers is None else [layers] if isinstance(layers, str) else list(layers)
    figure, pairs = _pairs(len(given), axes, figure)
    everywhere = {name for run in given for name in run.heads["layer"].unique()}
    chosen = []
    for (above, below), run in zip(pairs, given, strict=True):
        draw_series(above, scalar(run), label="loss")
        if not above.lines:
            style.say(above, "no loss was recorded")
        chosen.append(_three(run, wanted, everywhere))
        draw_entropy(below, run, chosen[-1])
        if not below.lines:
            style.say(below, NOTHING)
        style.dress(above, style.short([run.name])[0], "", xlabel="")
        style.dress(below, "", "")
        style.integer_steps(above)
        style.integer_steps(below)
        above.tick_params(labelbottom=False)
    _alike([above for above, _ in pairs])
    _alike([below for _, below in pairs], bottom=0.0)
    _same_steps([ax for pair in pairs for ax in pair])
    for above, below in pairs:
        if axes is not None or _leftmost(above):
            above.set_ylabel("loss")
            below.set_ylabel(label("entropy"))
        else:
            above.tick_params(labelleft=False, which="both")
            below.tick_params(labelleft=False)
    own = axes is None and all(names == chosen[0] for names in chosen)
    if own:
        style.legend_of_figure(figure, [below for _, below in pairs], "layer")
    else:
        for _, below in pairs:
            style.legend_outside(below, "layer")
    return canvas.whole(figure)


def paper_figure_2(
    runs: RunTables | Sequence[RunTables],
    *,
    metric: str = "loss",
    column: str = "sigma_qk",
    groups: Sequence[str] | None = None,
    axes: Sequence[Axes] | None = None,
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """Performance, attention entropy and largest singular value of attention weights; a line for each run.

    The paper's Figure 2 has the best and the worst run of σReparam, of spectral normalisation and of a
    baseline. Entropy is the mean over all heads of the model, the singular value the largest of any.

    Args:
        runs: a run as `load_run` returns it, or several.
        metric: the scalar of the upper panel: `loss`, or one that you gave to `monitor.step`.
        column: which spectral norm: `sigma_qk`, or `sigma_q`, `sigma_k`, …
        groups: the method of each run: a colour for each, its first run solid, further ones dashed.
        axes: three axes to draw on.
        figure: an empty figure to draw on, instead of axes; None makes one.

    Returns:
        The figure, with three axes.

    Raises:
        ConfigurationError: there are no runs, not three axes, not a group for each run, or no such column.
    """
    given = as_runs(runs)
    looks = looks_of(given, groups)
    figure, parts = canvas.panels((3, 1), axes, figure, (canvas.DOUBLE_COLUMN, 5.6), sharex=True)
    name = style.plain(metric)
    titles = [name, "attention entropy, mean over all heads", f"largest {label(column)} of any head"]
    _metric(parts[0], given, looks, metric)
    _mean_entropy(parts[1], given, looks, [None] * len(given))
    draw_largest(parts[2], [values_of(run, column) for run in given], looks)
    _stack(parts, titles, [name, label("entropy"), label(column).split(" = ")[0]])
    return canvas.whole(figure)


def paper_figure_3(
    runs: RunTables | Sequence[RunTables],
    layer: str | int | None = None,
    *,
    metric: str = "loss",
    column: str = "sigma_qk",
    groups: Sequence[str] | None = None,
    axes: Sequence[Axes] | None = None,
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """Performance, and entropy, spectral norm and ℓ∞ gradient norm of one layer; a line for each run.

    The paper's Figure 3 has the first attention layer of self-supervised runs, the best and the worst of each
    method. It tells two kinds of instability apart: gradient norms that jump, and spectral norms that grow
    until entropy collapses.

    Args:
        runs: a run as `load_run` returns it, or several.
        layer: its name, or its place in order of execution, from either end; None: the first.
        metric: the scalar of the upper panel: `loss`, or one that you gave to `monitor.step`.
        column: which spectral norm: `sigma_qk`, or `sigma_q`, `sigma_k`, …
        groups: the method of each run: a colour for each, its first run solid, further ones dashed.
        axes: four axes to draw on.
        figure: an empty figure to draw on, instead of axes; None makes one.

    Returns:
        The figure, with four axes.

    Raises:
        ConfigurationError: there are no runs, not four axes, not a group for each run, a run has no such
            layer, or there is no such column.
    """
    given = as_runs(runs)
    looks = looks_of(given, groups)
    figure, parts = canvas.panels((4, 1), axes, figure, (canvas.DOUBLE_COLUMN, 7.0), sharex=True)
    where = [layer_of(run, layer) for run in given]
    names = list(dict.fromkeys(name for name in where if name is not None))
    place = style.short(names)[0] if len(names) == 1 else "the layer"
    performance = style.plain(metric)
    titles = [
        performance,
        f"attention entropy, mean over the heads of {place}",
        f"largest {label(column)} of {place}",
        f"ℓ∞ norm of the gradient of the attention weights of {place}",
    ]
    _metric(parts[0], given, looks, metric)
    _mean_entropy(parts[1], given, looks, where)
    for ax, name in ((parts[2], column), (parts[3], "grad_linf")):
        tables = [values_of(run, name, at) for run, at in zip(given, where, strict=True)]
        draw_largest(ax, tables, looks)
    _stack(parts, titles, [performance, label("entropy"), label(column).split(" = ")[0], label("grad_linf")])
    return canvas.whole(figure)


def _pairs(
    count: int, axes: Sequence[Axes] | None, figure: Figure | SubFigure | None
) -> tuple[Figure | SubFigure, list[tuple[Axes, Axes]]]:
    """Axes for loss and entropy of each run."""
    if axes is not None:
        figure, flat = canvas.panels((count, 2), axes, figure, (0, 0))
        return figure, list(zip(flat[::2], flat[1::2], strict=True))
    columns = min(count, _MOST_COLUMNS)
    rows = -(-count // columns)
    size = (canvas.DOUBLE_COLUMN if columns > 1 else 4.4, 0.5 + 3.4 * rows)
    figure, flat = canvas.panels((2 * rows, columns), None, figure, size)
    pairs = []
    for i in range(rows * columns):
        row, column = divmod(i, columns)
        pair = flat[2 * row * columns + column], flat[(2 * row + 1) * columns + column]
        if i < count:
            pairs.append(pair)
        else:
            for ax in pair:
                ax.remove()
    return figure, pairs


def _three(run: RunTables, wanted: Sequence[str] | None, everywhere: set[str]) -> list[str]:
    """The layers of this run to draw: those that were asked for and that it has, or three."""
    table = column_of(run, "entropy")
    if wanted is None:
        return choose_layers(table, None, most=3)[0]
    unknown = [name for name in wanted if name not in everywhere]
    here = set(table["layer"].unique())
    return choose_layers(table, unknown or [name for name in wanted if name in here])[0]


def _alike(axes: Sequence[Axes], bottom: float | None = None) -> None:
    """One scale and one range for axes that are compared by eye."""
    if any(ax.get_yscale() == "log" for ax in axes):
        for ax in axes:
            if ax.get_ylim()[0] > 0 or ax.dataLim.minposy < float("inf"):
                ax.set_yscale("log")
    filled = [ax for ax in axes if ax.lines]
    low = min((ax.get_ylim()[0] for ax in filled), default=0.0) if bottom is None else bottom
    high = max((ax.get_ylim()[1] for ax in filled), default=1.0)
    for ax in axes:
        ax.set_ylim(low, high)


def _same_steps(axes: Sequence[Axes]) -> None:
    """One range of steps for all axes that have any."""
    ranges = [ax.get_xlim() for ax in axes if any(np.size(line.get_xdata()) for line in ax.lines)]
    if ranges:
        for ax in axes:
            ax.set_xlim(min(low for low, _ in ranges), max(high for _, high in ranges))


def _leftmost(ax: Axes) -> bool:
    place = ax.get_subplotspec()
    return place is None or place.is_first_col()


def _metric(ax: Axes, runs: Sequence[RunTables], looks: Sequence[Look], metric: str) -> None:
    for run, look in zip(runs, looks, strict=True):
        draw_series(ax, scalar(run, metric), colour=look.colour, label=look.name, dashes=look.dashes)
    if not ax.lines:
        style.say(ax, f"no {style.plain(metric)} was recorded")


def _mean_entropy(
    ax: Axes,
    runs: Sequence[RunTables],
    looks: Sequence[Look],
    layers: Sequence[str | None],
) -> None:
    for run, look, layer in zip(runs, looks, layers, strict=True):
        draw_run(ax, mean_known(values_of(run, "entropy", layer)), look)
    say_if_empty(ax)
    ax.set_ylim(bottom=0.0)


def _stack(parts: Sequence[Axes], titles: Sequence[str], labels: Sequence[str]) -> None:
    for i, (ax, title, ylabel) in enumerate(zip(parts, titles, labels, strict=True)):
        last = i == len(parts) - 1
        style.dress(ax, title, ylabel, xlabel="training step" if last else "")
        style.integer_steps(ax)
    below = style.narrow(parts[-1])
    style.legend_outside(parts[-1] if below else parts[0], "run", of=parts[1])
