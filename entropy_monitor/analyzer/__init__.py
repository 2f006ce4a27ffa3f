"""Records in, alerts out: what the figures of a run mean, and when its owner must know.

`Analyzer.update` takes one `Record` and gives the alerts that opened, changed or closed with it.
Nothing here touches a model, a file or a screen; numpy is all it needs. A new detector is one
module with a class that meets `detector.Detector`, and one line in `registry.py`.
"""

from __future__ import annotations

from entropy_monitor.analyzer.analyzer import Analyzer
from entropy_monitor.analyzer.thresholds import Thresholds

__all__ = ["Analyzer", "Thresholds"]
