"""Figures of a run: matplotlib, in any script or notebook.

Every function takes a run as `entropy_monitor.load_run` returns it and leaves pyplot and rcParams
alone. Those that take `ax` return it; without one they make a figure, found as `ax.figure`.
`overview` and `compare` return their figure. Importing this package needs matplotlib: `pip install
'entropy-monitor[plots]'`.
"""

from __future__ import annotations

from entropy_monitor.errors import MissingExtraError

try:
    import matplotlib as mpl  # noqa: F401
except ImportError as error:
    raise MissingExtraError("matplotlib", "plots", "drawing figures") from error

from entropy_monitor.figures.comparison import compare
from entropy_monitor.figures.images import attention_map, heatmap
from entropy_monitor.figures.lines import entropy, floors, overview, sigma

__all__ = [
    "attention_map",
    "compare",
    "entropy",
    "floors",
    "heatmap",
    "overview",
    "sigma",
]
