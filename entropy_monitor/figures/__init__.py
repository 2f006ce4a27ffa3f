"""Figures of a run: matplotlib, in any script or notebook, in a form that can be published.

Every function takes a run as `entropy_monitor.load_run` returns it, or several where it says so, and
leaves pyplot and rcParams alone. Colours can be told apart by colour-blind readers; axes bear units.

A figure of one panel takes `ax`, draws there and returns it; without one it makes a figure, found as
`ax.figure`. A figure of several panels takes `axes` (a sequence) or `figure`, and returns the figure.
Text and legends follow the room there is. For a column of a journal:

```python
fig = figures.new_figure(figures.SINGLE_COLUMN, 2.6)
figures.entropy(run, ax=fig.subplots())
fig.savefig("entropy.pdf")
```

Importing this package needs matplotlib: `pip install 'entropy-monitor[plots]'`.
"""

from __future__ import annotations

from entropy_monitor.errors import MissingExtraError

try:
    import matplotlib as mpl  # noqa: F401
except ImportError as error:
    raise MissingExtraError("matplotlib", "plots", "drawing figures") from error

from entropy_monitor.figures.canvas import DOUBLE_COLUMN, SINGLE_COLUMN, new_figure
from entropy_monitor.figures.comparison import compare
from entropy_monitor.figures.floors import entropy_against_floor, floors
from entropy_monitor.figures.heads_map import heads_map
from entropy_monitor.figures.images import alert_map, attention_map, heatmap
from entropy_monitor.figures.layers import entropy, gradient, loss, sigma, spectral_growth
from entropy_monitor.figures.overview import overview
from entropy_monitor.figures.paper import paper_figure_1, paper_figure_2, paper_figure_3
from entropy_monitor.figures.style import OKABE_ITO
from entropy_monitor.figures.sweeps import sweep

__all__ = [
    "DOUBLE_COLUMN",
    "OKABE_ITO",
    "SINGLE_COLUMN",
    "alert_map",
    "attention_map",
    "compare",
    "entropy",
    "entropy_against_floor",
    "floors",
    "gradient",
    "heads_map",
    "heatmap",
    "loss",
    "new_figure",
    "overview",
    "paper_figure_1",
    "paper_figure_2",
    "paper_figure_3",
    "sigma",
    "spectral_growth",
    "sweep",
]
