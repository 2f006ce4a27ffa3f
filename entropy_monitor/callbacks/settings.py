"""What every callback takes: checked when it is made, used when the framework has made its model."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from entropy_monitor import options as opt
from entropy_monitor.analyzer import Thresholds
from entropy_monitor.errors import ConfigurationError, RunDirectoryError
from entropy_monitor.plan import BUDGET
from entropy_monitor.records import Alert, Sink
from entropy_monitor.run_info import describe_model
from entropy_monitor.store import check_run_dir
from entropy_monitor.trackers import MetricFunction

logger = logging.getLogger("entropy_monitor")

_MOST_PLACES = 1_000


@dataclass(frozen=True)
class Settings:
    """Arguments of `EntropyMonitor`, kept until the framework has made model and optimizer.

    Raises:
        ConfigurationError: one is not usable.
    """

    run_dir: str | os.PathLike[str] | None = None
    every: int | Literal["auto"] = "auto"
    rows: int | Literal["all", "auto"] = "auto"
    budget: float | None = BUDGET
    loggers: Sequence[Sink | MetricFunction] = ()
    on_alert: Callable[[Alert], object] | None = None
    thresholds: Thresholds | None = None
    owners: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.run_dir is not None and not isinstance(self.run_dir, (str, os.PathLike)):
            raise ConfigurationError(f"run_dir must be a path, got {self.run_dir!r}")
        opt.check_every(self.every)
        opt.check_row_choice(self.rows)
        opt.check_budget(self.budget)
        opt.check_sinks(self.loggers)
        opt.check_on_alert(self.on_alert)
        opt.check_thresholds(self.thresholds)
        if isinstance(self.owners, str) or not all(isinstance(p, str) for p in self.owners):
            raise ConfigurationError(f"owners must be a list of name patterns, got {self.owners!r}")

    def arguments(
        self,
        model: nn.Module,
        optimizers: Sequence[object],
        sink: Sink,
        default_dir: str | os.PathLike[str] | None,
    ) -> dict[str, Any]:
        """Those of `EntropyMonitor(model, …)`, for the model at hand.

        Args:
            model: in training, not wrapped.
            optimizers: the framework's, wrapped or not; those that cannot be read are left out, with a word.
            sink: gets every record, beside the user's loggers.
            default_dir: of the run, where none was given: it, or a place beside it where it holds another
                model's.
        """
        run_dir = self.run_dir
        if run_dir is None and default_dir is not None:
            run_dir = free_dir(Path(default_dir), model)
        return {
            "optimizer": readable(optimizers, model),
            "run_dir": run_dir,
            "every": self.every,
            "rows": self.rows,
            "budget": self.budget,
            "loggers": [sink, *self.loggers],
            "on_alert": self.on_alert,
            "thresholds": self.thresholds,
            "owners": self.owners,
        }


def readable(optimizers: Sequence[object], model: nn.Module) -> list[Optimizer]:
    """Those whose steps can be read, out of their wrappers; the others are told."""
    found: list[Optimizer] = []
    for optimizer in optimizers:
        try:
            found += opt.check_optimizers(optimizer, model)
        except ConfigurationError as error:
            kind = type(optimizer).__name__
            logger.warning("entropy-monitor: gradients and updates of %s are not read: %s", kind, error)
    return found


def free_dir(path: Path, model: nn.Module) -> Path:
    """The first of `path`, `path-2`, … that can take a run of this model: for every rank the same one."""
    description = describe_model(model)
    for n in range(1, _MOST_PLACES):
        place = path if n == 1 else path.with_name(f"{path.name}-{n}")
        try:
            check_run_dir(place, description)
        except RunDirectoryError:
            continue
        return place
    return path  # the monitor will say what is wrong with it


def fresh_dir(path: Path) -> Path:
    """The first of `path`, `path-2`, … that does not exist."""
    n, place = 1, path
    while place.exists():
        n += 1
        place = path.with_name(f"{path.name}-{n}")
    return place
