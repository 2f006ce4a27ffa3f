"""The monitor's arguments, checked before anything is touched."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from entropy_monitor.errors import AttentionNotFoundError, ConfigurationError
from entropy_monitor.hooks import attention_candidates, parameter_shapes
from entropy_monitor.records import Sink


def check_every(every: object) -> None:
    """Raise unless `every` is a positive integer."""
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ConfigurationError(
            f"every must be a positive integer (steps between measurements), got {every!r}"
        )


def check_sinks(loggers: object) -> tuple[Sink, ...]:
    """The loggers, or an error that names the one that is none."""
    if isinstance(loggers, (str, Sink)) or not isinstance(loggers, Sequence):
        raise ConfigurationError(
            f"loggers must be a list of loggers, got {loggers!r}: "
            "for example loggers=[TensorBoardLogger('runs/a/tb')]"
        )
    for i, logger in enumerate(loggers):
        if not isinstance(logger, Sink):
            hint = " (the class: make an instance of it)" if isinstance(logger, type) else ""
            raise ConfigurationError(
                f"loggers[{i}] is {logger!r}{hint}; a logger is an instance of a class derived from "
                "entropy_monitor.records.Sink, such as entropy_monitor.dashboards.TensorBoardLogger(…) or "
                "WandbLogger(…)"
            )
    return tuple(loggers)


def check_optimizers(optimizer: object, model: nn.Module) -> tuple[Optimizer, ...]:
    """The optimizers behind what was given, unwrapped; or an error that says what was given instead."""
    given = optimizer if isinstance(optimizer, (list, tuple)) else () if optimizer is None else (optimizer,)
    found = []
    for item in given:
        inner = item
        while isinstance(getattr(inner, "optimizer", None), Optimizer):
            inner = inner.optimizer  # type: ignore[attr-defined]
        if not isinstance(inner, Optimizer):
            raise ConfigurationError(
                f"optimizer must be a torch.optim.Optimizer, or a list of them, got {type(item).__name__}"
            )
        found.append(inner)
    mine = set(model.parameters())
    theirs = {p for o in found for group in o.param_groups for p in group["params"]}
    if found and not mine & theirs:
        raise ConfigurationError(
            "optimizer holds no parameter of model: was the model replaced or moved after the optimizer was made?"
        )
    return tuple(found)


def check_structure(model: nn.Module, owners: Sequence[str]) -> None:
    """Raise where a model has nothing that could be attention, or cannot be read yet."""
    for name, module in model.named_modules():
        compiled = type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None)
        if compiled:
            raise ConfigurationError(
                f"{name or type(module).__name__} is compiled: attention inside torch.compile cannot be read. "
                "Watch an uncompiled model, or use entropy_monitor.measure(model, batch) on the original module "
                "between steps."
            )
    if not owners and not attention_candidates(model):
        raise AttentionNotFoundError(
            f"{type(model).__name__} has no attention: looked for nn.MultiheadAttention, for modules whose class "
            "or name speaks of attention, and for code that calls scaled_dot_product_attention or a softmax. "
            "Name the modules by hand if there is some: owners=['blocks.*.mixer']"
        )


def resolve_run_dir(run_dir: str | Path | None, model: nn.Module) -> Path:
    """The run directory: as given, or a fresh one below `runs/`."""
    if run_dir is not None:
        return Path(run_dir)
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{type(model).__name__}"
    path, n = Path("runs") / stem, 1
    while path.exists():
        n += 1
        path = Path("runs") / f"{stem}-{n}"
    return path


def describe_model(model: nn.Module) -> dict[str, Any]:
    """What makes two runs runs of one model: parameter names and shapes."""
    return {"class": type(model).__qualname__, "parameters": parameter_shapes(model)}


def versions() -> dict[str, str]:
    """Of Python, torch and this package."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        own = version("entropy-monitor")
    except PackageNotFoundError:  # run from a source tree that is not installed
        own = "unknown"
    return {"python": sys.version.split()[0], "torch": torch.__version__, "entropy_monitor": own}
