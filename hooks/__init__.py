"""How a model's attention is found and read: one file for each way that attention is called.

`Watcher` sees the calls, `Recorder` measures them. Nothing here knows of analysis or display.
"""

from __future__ import annotations

from entropy_monitor.hooks.compiled.switch import available as compiled_code_is_read
from entropy_monitor.hooks.names import module_names, parameter_shapes
from entropy_monitor.hooks.observer import Sightings
from entropy_monitor.hooks.reading import FIGURES
from entropy_monitor.hooks.recorder import Harvest, Recorder
from entropy_monitor.hooks.structure import attention_candidates, is_compiled
from entropy_monitor.hooks.watcher import Watcher
from entropy_monitor.hooks.weights import WeightWatcher

__all__ = [
    "FIGURES",
    "Harvest",
    "Recorder",
    "Sightings",
    "Watcher",
    "WeightWatcher",
    "attention_candidates",
    "compiled_code_is_read",
    "is_compiled",
    "module_names",
    "parameter_shapes",
]
