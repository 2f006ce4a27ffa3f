"""Where people look at a run: TensorBoard, Weights & Biases, pages of their own.

Names are resolved on first use, so that importing this package loads neither tensorboard nor wandb.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from entropy_monitor.dashboards.report import write_report
    from entropy_monitor.dashboards.tensorboard_logger import TensorBoardLogger
    from entropy_monitor.dashboards.wandb_logger import WandbLogger
    from entropy_monitor.trackers import FunctionLogger

_HOMES = {
    "FunctionLogger": "entropy_monitor.trackers",
    "write_report": "entropy_monitor.dashboards.report",
    "TensorBoardLogger": "entropy_monitor.dashboards.tensorboard_logger",
    "WandbLogger": "entropy_monitor.dashboards.wandb_logger",
}

__all__ = ["FunctionLogger", "TensorBoardLogger", "WandbLogger", "write_report"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
