"""What is kept of a run before its first record: the model, the settings, the versions."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from entropy_monitor.analyzer import Thresholds
from entropy_monitor.errors import ConfigurationError
from entropy_monitor.hooks import parameter_shapes
from entropy_monitor.records import RunInfo


def describe_model(model: nn.Module) -> dict[str, Any]:
    """What makes two runs runs of one model: parameter names and shapes.

    Raises:
        ConfigurationError: its first forward is still to make some of them.
    """
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise ConfigurationError(
            f"{', '.join(lazy[:5])} of {type(model).__name__} are made by its first forward (a lazy module): "
            "run one before attaching the monitor, or give example_inputs"
        )
    return {"class": type(model).__qualname__, "parameters": parameter_shapes(model)}


def settings(
    every: int | str,
    rows: int | str,
    budget: float | None,
    owners: Sequence[str],
    optimizers: Sequence[Optimizer],
    thresholds: Thresholds,
) -> dict[str, Any]:
    """A monitor's arguments as the run directory keeps them."""
    return {
        "every": every,
        "rows": rows,
        "budget": budget,
        "owners": list(owners),
        "optimizers": [type(o).__name__ for o in optimizers],
        "thresholds": asdict(thresholds),
    }


def run_info(
    description: Mapping[str, Any],
    options: Mapping[str, Any],
    run_dir: Path,
    session: int,
    rank: int,
    launch: str,
) -> RunInfo:
    """What sinks are told of a run before its first record."""
    return RunInfo(
        model=description,
        options=options,
        versions=versions(),
        run_dir=str(run_dir),
        session=session,
        rank=rank,
        launch=launch,
    )


def versions() -> dict[str, str]:
    """Of Python, torch and this package."""
    try:
        own = version("entropy-monitor")
    except PackageNotFoundError:  # run from a source tree that is not installed
        own = "unknown"
    return {"python": sys.version.split()[0], "torch": torch.__version__, "entropy_monitor": own}
