"""The monitor's arguments, checked before anything is touched."""

from __future__ import annotations

import math
import operator
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from entropy_monitor import processes
from entropy_monitor.analyzer import Thresholds
from entropy_monitor.errors import AttentionNotFoundError, ConfigurationError, EntropyMonitorError
from entropy_monitor.hooks import (
    attention_candidates,
    compiled_code_is_read,
    is_compiled,
    module_names,
)
from entropy_monitor.looking import check_owners, check_rows, measure
from entropy_monitor.records import Sink
from entropy_monitor.store import check_run_dir
from entropy_monitor.trackers import FunctionLogger

if TYPE_CHECKING:
    from entropy_monitor.monitor import EntropyMonitor


def check_every(every: object) -> int | Literal["auto"]:
    """`every` as a plain integer, or "auto"."""
    if isinstance(every, str) and every == "auto":
        return "auto"
    if isinstance(every, (int, np.integer)) and not isinstance(every, bool) and every >= 1:
        return int(every)
    raise ConfigurationError(
        f"every must be a positive integer (steps between measurements) or 'auto', got {every!r}"
    )


def check_row_choice(rows: object) -> int | Literal["all", "auto"]:
    """`rows` as a plain integer, "all" or "auto"."""
    if isinstance(rows, str) and rows == "auto":
        return "auto"
    try:
        return check_rows(rows)
    except ConfigurationError:
        raise ConfigurationError(f"rows must be a positive integer, 'all' or 'auto', got {rows!r}") from None


def check_budget(budget: object) -> float | None:
    """The budget as a float, or None."""
    if budget is None:
        return None
    if isinstance(budget, (int, float, np.integer, np.floating)) and not isinstance(budget, bool):
        share = float(budget)
        if 0 < share < math.inf:
            return share
    raise ConfigurationError(
        "budget must be a positive number (the share of the training's time that measuring may take, such as "
        f"0.01) or None, got {budget!r}"
    )


def check_sinks(loggers: object) -> tuple[Sink, ...]:
    """The loggers, callables among them as sinks; or an error that names the one that is none."""
    if isinstance(loggers, (str, Sink)) or not isinstance(loggers, Sequence):
        raise ConfigurationError(
            f"loggers must be a list of loggers, got {loggers!r}: "
            "for example loggers=[TensorBoardLogger('runs/a/tb')]"
        )
    sinks: list[Sink] = []
    for i, logger in enumerate(loggers):
        if any(logger is other for other in loggers[:i]):
            raise ConfigurationError(f"loggers[{i}] is in the list twice: {logger!r}")
        sinks.append(_sink(logger, f"loggers[{i}]"))
    return tuple(sinks)


def _sink(logger: object, name: str) -> Sink:
    if isinstance(logger, Sink):
        return logger
    if not callable(logger) or isinstance(logger, type):
        hint = " (the class: make an instance of it)" if isinstance(logger, type) else ""
        raise ConfigurationError(
            f"{name} is {logger!r}{hint}; a logger is an instance of a class derived from "
            "entropy_monitor.records.Sink, such as entropy_monitor.dashboards.TensorBoardLogger(…) or "
            "WandbLogger(…), or a function of metrics and step"
        )
    try:
        return FunctionLogger(logger)
    except ConfigurationError as error:
        raise ConfigurationError(f"{name}: {error}") from None


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


def check_state(state: object, version: int) -> None:
    """Raise unless this is what `EntropyMonitor.state_dict` gives, in a version that is read."""
    if not isinstance(state, Mapping) or state.get("version") != version:
        found = state.get("version") if isinstance(state, Mapping) else None
        raise ConfigurationError(
            f"state is none that this package reads: its version is {found!r}, not {version}. "
            "Load what EntropyMonitor.state_dict() gave, or start without it"
        )
    missing = sorted({"schedule", "plan", "analyzer", "scalars"} - set(state))
    if missing:
        raise ConfigurationError(f"state is incomplete: it has no {', '.join(missing)}")


def check_part(state: Mapping[str, Any], part: str, load: Callable[[Any], object]) -> None:
    """Raise where a part of a state cannot be loaded.

    Args:
        state: what `EntropyMonitor.state_dict` gave.
        part: which part.
        load: takes it over, into something that is thrown away.
    """
    try:
        load(state[part])
    except (KeyError, TypeError, ValueError, AttributeError, LookupError) as error:
        raise ConfigurationError(
            f"state is damaged: its {part} cannot be read ({type(error).__name__}: {error}). "
            "Load what EntropyMonitor.state_dict() gave, or start without it"
        ) from error


def innermost(model: nn.Module) -> nn.Module:
    """The module within wrappers that run nothing of their own: torch.compile, DDP, DataParallel, FSDP."""
    for name in ("_orig_mod", "_fsdp_wrapped_module", "module"):
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module) and type(model).__name__ in _WRAPPERS:
            return innermost(inner)
    return model


_WRAPPERS = frozenset(
    {"OptimizedModule", "DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"}
)


def check_wrapper(model: nn.Module) -> None:
    """Raise where a wrapper runs other modules than those it holds."""
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        raise ConfigurationError(
            f"model is an nn.DataParallel over {len(model.device_ids)} devices: each forward runs in copies "
            "of its modules that are gone afterwards and cannot be read. Use "
            "torch.nn.parallel.DistributedDataParallel, or a single device"
        )


def check_alone(model: nn.Module, monitors: Sequence[EntropyMonitor]) -> None:
    """Raise where one of these monitors, which are not closed, watches the model already."""
    for other in monitors:
        if innermost(other.model) is innermost(model):
            raise ConfigurationError(
                f"{type(innermost(model)).__name__} is watched already, by the EntropyMonitor that writes to "
                f"{other.run_dir}: call close() on that one first. measure() and capture() may be used "
                "beside it"
            )


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
    elif not owners and not attention_candidates(model) and not processes.is_distributed():
        # Of several processes one may hold a part of a model that has no attention.
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
    if run_dir is None and processes.is_distributed():
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
