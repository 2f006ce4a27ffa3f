"""What a logger draws of all heads at once, and when: heatmaps of layers by heads, and histograms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from entropy_monitor.dashboards.cadence import Cadence
from entropy_monitor.dashboards.colour_scale import SHARES, ColourScale, Decades
from entropy_monitor.dashboards.grids import head_figures, head_grid
from entropy_monitor.dashboards.heatmap import Image, heatmap
from entropy_monitor.records import Columns
from entropy_monitor.trackers.aggregates import PREFIX

FloatArray = npt.NDArray[np.float64]

FIGURES: dict[str, str] = {
    "entropy_share": "entropy of each head as a share of its maximum: 0 looks at one key, 1 at all alike",
    "max_logit": "largest logit that each head's softmax sees",
    "sigma_qk": "spectral norm of W_K W_Qᵀ of each head",
}
"""What is drawn, and what it is. σ_QK is known in some records only, and drawn where it is of all heads."""

COLOURS = "rows are layers, columns heads; grey: not known, red: not finite"

_SHARE_EDGES = np.linspace(0.0, 1.0, 51)
_BINS = 40


@dataclass(frozen=True)
class Histogram:
    """How many heads have which figure.

    Attributes:
        counts: `[bins]`, int64.
        edges: `[bins + 1]`, float64, ascending.
        total: sum of the figures.
        squares: sum of their squares.
    """

    counts: npt.NDArray[np.int64]
    edges: FloatArray
    total: float
    squares: float


class HeadPictures:
    """Heatmaps and histograms of one run's records, each at its own cadence (`Cadence`).

    Args:
        heatmap_every: records between two heatmaps of a figure early in the run. 0: none.
        histogram_every: the same for histograms.

    Raises:
        ConfigurationError: one is negative or no whole number.
    """

    def __init__(self, heatmap_every: int, histogram_every: int) -> None:
        self._heatmaps = {name: Cadence(heatmap_every, "heatmap_every") for name in FIGURES}
        self._histograms = {name: Cadence(histogram_every, "histogram_every") for name in FIGURES}
        self._scales = {"max_logit": Decades(1.0, 100.0), "sigma_qk": Decades()}

    def heatmaps(self, heads: Columns, in_full: bool) -> Iterator[tuple[str, Image]]:
        """Tag and picture of those that are due.

        Args:
            heads: of one record.
            in_full: whether norms are known of all heads.
        """
        for name, values in _known(heads, in_full):
            scale = SHARES
            if name in self._scales:
                scale = self._scales[name].take(values)
            if self._heatmaps[name].due():
                yield f"{PREFIX}/{name}", _draw(heads, values, scale)

    def histograms(self, heads: Columns, in_full: bool) -> Iterator[tuple[str, Histogram]]:
        """Tag and histogram of those that are due; what is not finite does not count."""
        for name, values in _known(heads, in_full):
            if self._histograms[name].due():
                edges = _SHARE_EDGES if name == "entropy_share" else None
                yield f"{PREFIX}/heads/{name}", histogram(values, edges)


def histogram(values: FloatArray, edges: FloatArray | None = None) -> Histogram:
    """Counts the finite figures among `values`, of which there must be one.

    Args:
        values: `[heads]`.
        edges: of the bins; by default 40 from the least figure to the largest. What lies beyond counts in
            the outermost bins.
    """
    finite = values[np.isfinite(values)]
    if edges is None:
        counts, edges = np.histogram(finite, _BINS)
    else:
        counts, _ = np.histogram(np.clip(finite, edges[0], edges[-1]), edges)
    return Histogram(counts.astype(np.int64), edges, float(finite.sum()), float(np.square(finite).sum()))


def _known(heads: Columns, in_full: bool) -> Iterator[tuple[str, FloatArray]]:
    """Figures of which a record has something to show."""
    for name in FIGURES:
        if name != "sigma_qk" or in_full:
            values = head_figures(heads, name)
            if np.isfinite(values).any():
                yield name, values


def _draw(heads: Columns, values: FloatArray, scale: ColourScale) -> Image:
    grid = head_grid(heads, values)
    return heatmap(grid.values, grid.layers, scale)
