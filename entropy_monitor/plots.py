"""The figures of a run as its methods: `run.plot_entropy()` is `figures.entropy(run)`.

matplotlib is imported when the first is called.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from entropy_monitor.frames import SHARE, RunTables

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


class Plots:
    """What `Run` draws. Every method takes what the function of `entropy_monitor.figures` takes.

    Those of one panel draw on `ax` and return it, or make a figure, found as `ax.figure`. Those of several
    take `axes` or `figure`, and return the figure; those that compare take further runs first.
    """

    def plot_loss(self: RunTables, name: str = "loss", *, ax: Axes | None = None) -> Axes:
        """The loss, or another scalar, over steps; see `figures.loss`."""
        from entropy_monitor import figures

        return figures.loss(self, name, ax=ax)

    def plot_entropy(self: RunTables, layers: Iterable[str] | None = None, *, ax: Axes | None = None) -> Axes:
        """Entropy of layers over steps; see `figures.entropy`."""
        from entropy_monitor import figures

        return figures.entropy(self, layers, ax=ax)

    def plot_sigma(
        self: RunTables,
        layers: Iterable[str] | None = None,
        *,
        column: str = "sigma_qk",
        ax: Axes | None = None,
    ) -> Axes:
        """A spectral norm of layers over steps; see `figures.sigma`."""
        from entropy_monitor import figures

        return figures.sigma(self, layers, column=column, ax=ax)

    def plot_spectral_growth(
        self: RunTables,
        layers: Iterable[str] | None = None,
        *,
        column: str = "sigma_qk",
        ax: Axes | None = None,
    ) -> Axes:
        """A spectral norm of layers relative to the run's start; see `figures.spectral_growth`."""
        from entropy_monitor import figures

        return figures.spectral_growth(self, layers, column=column, ax=ax)

    def plot_gradient(
        self: RunTables,
        layers: Iterable[str] | None = None,
        *,
        column: str = "grad_linf",
        ax: Axes | None = None,
    ) -> Axes:
        """Gradient norm of the attention weights of layers over steps; see `figures.gradient`."""
        from entropy_monitor import figures

        return figures.gradient(self, layers, column=column, ax=ax)

    def plot_floors(
        self: RunTables,
        layer: str | None = None,
        head: int | None = None,
        call: int = 0,
        *,
        ax: Axes | None = None,
    ) -> Axes:
        """One head's entropy above its floors over steps; see `figures.floors`."""
        from entropy_monitor import figures

        return figures.floors(self, layer, head, call, ax=ax)

    def plot_entropy_against_floor(
        self: RunTables, floor: str = "floor_row", *, step: int | None = None, ax: Axes | None = None
    ) -> Axes:
        """The entropy of every head over its floor at a step; see `figures.entropy_against_floor`."""
        from entropy_monitor import figures

        return figures.entropy_against_floor(self, floor, step=step, ax=ax)

    def plot_heatmap(self: RunTables, column: str = SHARE, *, ax: Axes | None = None) -> Axes:
        """A column of every head over steps; see `figures.heatmap`."""
        from entropy_monitor import figures

        return figures.heatmap(self, column, ax=ax)

    def plot_heads_map(
        self: RunTables, column: str = SHARE, *, step: int | None = None, ax: Axes | None = None
    ) -> Axes:
        """A column as layers × heads at a step; see `figures.heads_map`."""
        from entropy_monitor import figures

        return figures.heads_map(self, column, step=step, ax=ax)

    def plot_alert_map(self: RunTables, alert: int = 0, *, ax: Axes | None = None) -> Axes:
        """The attention map stored with a row of `alerts`; see `figures.alert_map`."""
        from entropy_monitor import figures

        return figures.alert_map(self, alert, ax=ax)

    def plot_overview(
        self: RunTables,
        layers: Iterable[str] | None = None,
        *,
        axes: Sequence[Axes] | None = None,
        figure: Figure | SubFigure | None = None,
    ) -> Figure:
        """The run on one page: loss, entropy, alerts; see `figures.overview`."""
        from entropy_monitor import figures

        return figures.overview(self, layers, axes=axes, figure=figure)

    def plot_compare(
        self: RunTables,
        *others: RunTables,
        axes: Sequence[Axes] | None = None,
        figure: Figure | SubFigure | None = None,
    ) -> Figure:
        """This run and others on common axes; see `figures.compare`."""
        from entropy_monitor import figures

        return figures.compare([self, *others], axes=axes, figure=figure)

    def plot_paper_figure_1(
        self: RunTables,
        *others: RunTables,
        layers: Iterable[str] | None = None,
        axes: Sequence[Axes] | None = None,
        figure: Figure | SubFigure | None = None,
    ) -> Figure:
        """Loss and entropy of three layers, a column for each run; see `figures.paper_figure_1`."""
        from entropy_monitor import figures

        return figures.paper_figure_1([self, *others], layers, axes=axes, figure=figure)

    def plot_paper_figure_2(
        self: RunTables,
        *others: RunTables,
        metric: str = "loss",
        column: str = "sigma_qk",
        groups: Sequence[str] | None = None,
        axes: Sequence[Axes] | None = None,
        figure: Figure | SubFigure | None = None,
    ) -> Figure:
        """Performance, entropy and largest singular value of runs; see `figures.paper_figure_2`."""
        from entropy_monitor import figures

        return figures.paper_figure_2(
            [self, *others], metric=metric, column=column, groups=groups, axes=axes, figure=figure
        )

    def plot_paper_figure_3(
        self: RunTables,
        *others: RunTables,
        layer: str | int | None = None,
        metric: str = "loss",
        column: str = "sigma_qk",
        groups: Sequence[str] | None = None,
        axes: Sequence[Axes] | None = None,
        figure: Figure | SubFigure | None = None,
    ) -> Figure:
        """Performance, and one layer's entropy, norm and gradient; see `figures.paper_figure_3`."""
        from entropy_monitor import figures

        return figures.paper_figure_3(
            [self, *others], layer, metric=metric, column=column, groups=groups, axes=axes, figure=figure
        )
