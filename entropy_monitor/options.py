"""The monitor's arguments, checked before anything is touched."""

from __future__ import annotations

import operator
import os
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from entropy_monitor.analyzer import Thresholds
from entropy_monitor.capture import check_owners, measure
from entropy_monitor.errors import AttentionNotFoundError, ConfigurationError, EntropyMonitorError
from entropy_monitor.hooks import (
    attention_candidates,
    compiled_code_is_read,
    is_compiled,
    module_names,
    parameter_shapes,
)
from entropy_monitor.hooks.recorder import LayerParts
from entropy_monitor.records import Sink
from entropy_monitor.store import check_run_dir


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
        if any(logger is other for other in loggers[:i]):
            raise ConfigurationError(f"loggers[{i}] is in the list twice: {logger!r}")
    return tuple(loggers)


def check_optimizers(optimizer: object, model: nn.Module) -> tuple[Optimizer, ...]:
    """The optimizers behind what was given, unwrapped; or an error that says what was given instead."""
    given = optimizer if isinstance(optimizer, (list, tuple)) else () if optimizer is None else (optimizer,)
    found = []
    for item in given:
        inner = item
        while (wrapped := getattr(inner, "optimizer", None)) is not None:
            inner = wrapped
        if not isinstance(inner, Optimizer):
            raise ConfigurationError(
                f"optimizer must be a torch.optim.Optimizer, or a list of them, got {type(item).__name__}"
            )
        found.append(inner)
    mine = set(model.parameters())
    theirs = {p for o in found for group in o.param_groups for p in group["params"]}
    if found and not mine & theirs:
        raise ConfigurationError(
            "optimizer holds no parameter of model: was the model replaced or moved after the optimizer was "
            "made?"
        )
    return tuple(found)


def check_on_alert(on_alert: object) -> None:
    """Raise unless this is callable, or None."""
    if on_alert is not None and not callable(on_alert):
        raise ConfigurationError(f"on_alert must be callable, such as print, got {on_alert!r}")


def check_step(step: object) -> None:
    """Raise unless this is an integer, or None."""
    try:
        None if step is None else operator.index(step)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigurationError(f"step must be an integer, got {step!r}") from None


def check_thresholds(thresholds: object) -> Thresholds:
    """The thresholds, or the default ones for None."""
    if thresholds is not None and not isinstance(thresholds, Thresholds):
        raise ConfigurationError(
            f"thresholds must be entropy_monitor.Thresholds(…), got {type(thresholds).__name__}"
        )
    return thresholds or Thresholds()


def check_attention(model: nn.Module, owners: Sequence[str], example_inputs: object) -> None:
    """Raise where a model has no attention that can be read, or cannot be read at all.

    Args:
        model: what is to be watched.
        owners: see `EntropyMonitor`.
        example_inputs: of one forward that tells; without it only the model's structure is looked at.
    """
    check_owners(model, owners)
    _check_compiled(model)
    if example_inputs is not None:
        _probe(model, owners, example_inputs)
    elif not owners and not attention_candidates(model):
        raise AttentionNotFoundError(
            f"{type(model).__name__} has no attention: looked for nn.MultiheadAttention, for modules whose "
            "class or name speaks of attention, and for code that calls scaled_dot_product_attention or a "
            "softmax. "
            "Name the modules by hand if there is some: owners=['blocks.*.mixer']"
        )


def _check_compiled(model: nn.Module) -> None:
    compiled = [name for module, name in module_names(model).items() if is_compiled(module)]
    if compiled and not compiled_code_is_read():
        raise ConfigurationError(
            f"{', '.join(compiled[:5])} is compiled, and this version of torch ({torch.__version__}) does "
            "not let attention inside torch.compile be read. Watch an uncompiled model, or call "
            "entropy_monitor.measure(model, batch) on the original module between steps."
        )


def _probe(model: nn.Module, owners: Sequence[str], example_inputs: object) -> None:
    """Find the attention in one forward without gradients; the model is as before afterwards."""
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = {}
    if isinstance(example_inputs, Mapping):
        kwargs = example_inputs
    else:
        args = example_inputs if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    try:
        measure(model, *args, rows=1, owners=owners, **kwargs)
    except EntropyMonitorError:
        raise
    except Exception as error:
        raise ConfigurationError(
            f"example_inputs: the forward of {type(model).__name__} raised {type(error).__name__}: {error}. "
            "Give what it is called with in training: a tuple of positional, or a dict of keyword arguments"
        ) from error


def check_run_path(run_dir: object, model: nn.Module, description: Mapping[str, Any]) -> Path:
    """The run directory: as given, or a fresh one below `runs/`; nothing is written.

    Raises:
        ConfigurationError: it is no path, or ranks would have to guess a common one.
        RunDirectoryError: it cannot take this run.
    """
    if run_dir is not None and not isinstance(run_dir, (str, os.PathLike)):
        raise ConfigurationError(f"run_dir must be a path, got {run_dir!r}")
    if run_dir is None and is_distributed():
        raise ConfigurationError(
            "run_dir must be given in distributed training, the same for every rank: run_dir='runs/a'"
        )
    path = _fresh_path(model) if run_dir is None else Path(os.fsdecode(run_dir))
    check_run_dir(path, description)
    return path


def _fresh_path(model: nn.Module) -> Path:
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{type(model).__name__}"
    path, n = Path("runs") / stem, 1
    while path.exists():
        n += 1
        path = Path("runs") / f"{stem}-{n}"
    return path


def is_distributed() -> bool:
    """Whether this is one of several processes of a training."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def rank() -> int:
    """Of this process, 0 where there is only one."""
    return torch.distributed.get_rank() if is_distributed() else 0


def describe_model(model: nn.Module) -> dict[str, Any]:
    """What makes two runs runs of one model: parameter names and shapes."""
    return {"class": type(model).__qualname__, "parameters": parameter_shapes(model)}


def describe_layers(layers: Mapping[str, LayerParts]) -> dict[str, Any]:
    """What is measured of each layer and how: the plan of a run."""
    return {
        name: {
            "layer_index": parts.index,
            "heads": parts.heads,
            "source": parts.source,
            "projections": dict(parts.projections),
        }
        for name, parts in layers.items()
    }


def versions() -> dict[str, str]:
    """Of Python, torch and this package."""
    try:
        own = version("entropy-monitor")
    except PackageNotFoundError:  # run from a source tree that is not installed
        own = "unknown"
    return {"python": sys.version.split()[0], "torch": torch.__version__, "entropy_monitor": own}
