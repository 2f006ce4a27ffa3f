"""Costs against sizes on logarithmic axes, with the exponent that was found beside the one expected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's, with a marker and a line for each besides; neighbours are two kinds of one thing.
_STYLES = (("#0072B2", "o", "-"), ("#56B4E9", "v", "--"), ("#D55E00", "s", "-"), ("#E69F00", "^", "--"))


@dataclass
class Sweep:
    """One size varied: `values[name]` are the costs at `sizes`, in seconds; `expected` the exponents."""

    title: str
    axis: str
    unit: str
    sizes: Sequence[int]
    expected: Mapping[str, float]
    values: dict[str, list[float]] = field(default_factory=dict)

    def exponent(self, name: str) -> float:
        """Slope of the logarithms, by least squares over the upper half of the sizes (two at least)."""
        costs = self.values[name]
        if len(costs) < 2:
            return float("nan")
        sizes, upper = self.sizes[: len(costs)], _fitted(len(costs))
        slope, _ = np.polyfit(np.log(sizes[-upper:]), np.log(costs[-upper:]), 1)
        return float(slope)


def _fitted(count: int) -> int:
    """How many of the largest sizes an exponent is taken from."""
    return max(2, (count + 1) // 2)


def draw(sweeps: Sequence[Sweep], path: Path, caption: str) -> None:
    """A panel for each sweep, as a PNG."""
    columns = 2
    rows = -(-len(sweeps) // columns)
    figure = Figure(figsize=(6.2 * columns, 4.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for i, sweep in enumerate(sweeps):
        ax = figure.add_subplot(rows, columns, i + 1)
        for (name, costs), (colour, marker, line) in zip(sweep.values.items(), _STYLES, strict=False):
            sizes = sweep.sizes[: len(costs)]
            found, expected = sweep.exponent(name), sweep.expected[name]
            label = f"{name}: exponent {found:.2f} (expected {expected:g})"
            ax.loglog(sizes, costs, color=colour, marker=marker, linestyle=line, label=label)
            upper = sizes[-_fitted(len(sizes)) :]
            guide = [costs[-1] * (n / upper[-1]) ** expected for n in upper]
            ax.loglog(upper, guide, color=colour, linestyle=":", linewidth=1)
        ax.set_title(sweep.title, loc="left")
        ax.set_xticks(sweep.sizes, [f"{n:,}" for n in sweep.sizes])
        ax.minorticks_off()
        ax.set_xlabel(sweep.axis)
        ax.set_ylabel(sweep.unit)
        ax.grid(visible=True, which="major", color="#dddddd", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(fontsize=8, frameon=False, loc="upper left")
        low, high = ax.get_ylim()
        ax.set_ylim(low, high * (high / low) ** 0.45)  # room for the legend
    figure.supxlabel(f"{caption}; dotted: the exponent expected", fontsize=8, color="#555555")
    figure.savefig(path, dpi=130)
