"""The monitor for a training loop with Hugging Face Accelerate."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from entropy_monitor import processes
from entropy_monitor.analyzer import Thresholds
from entropy_monitor.callbacks.metrics import MetricFeed, MetricSink
from entropy_monitor.callbacks.settings import Settings
from entropy_monitor.errors import ConfigurationError, MissingExtraError
from entropy_monitor.guard import Guard
from entropy_monitor.monitor import EntropyMonitor, StepReport
from entropy_monitor.plan import BUDGET
from entropy_monitor.records import Alert, Sink
from entropy_monitor.scalars import Number
from entropy_monitor.trackers import MetricFunction

try:
    from accelerate import Accelerator
except ImportError as error:
    raise MissingExtraError("accelerate", "accelerate", "attach") from error

_FOLDER = "entropy_monitor"  # below project_dir


class AcceleratedMonitor(EntropyMonitor):
    """An `EntropyMonitor` that knows its accelerator; made by `attach`."""

    _feed: MetricFeed | None = None

    def __init__(self, model: nn.Module, accelerator: Accelerator, sink: MetricSink, **options: Any) -> None:
        self._accelerator = accelerator
        self._losses: list[Any] = []  # of the batches since the last update
        self._reporting = Guard()
        super().__init__(model, **options)
        self._feed = MetricFeed(model, sink)

    def step(
        self,
        loss: Number | None = None,
        *,
        step: int | None = None,
        scalars: Mapping[str, Number] | None = None,
    ) -> StepReport:
        """End a batch; call after `optimizer.step()`, within `accelerator.accumulate(model)` or after it.

        A batch whose gradients are only accumulated ends no step; its loss enters the mean of the step.

        Args:
            loss: the batch's loss.
            step: the optimizer step's number; counted from 0 by default.
            scalars: more numbers to keep, by name; those of the batch that ends the step.

        Returns:
            What the step brought.

        Raises:
            AttentionNotFoundError: in the first step, where no attention was seen in its forward.
            ConfigurationError: in the first step, where an argument is not usable.
        """
        if loss is not None:
            self._losses.append(loss.detach() if isinstance(loss, Tensor) else loss)
        if not self._accelerator.sync_gradients:
            return StepReport(self._schedule.next if step is None else step, False)
        losses, self._losses = self._losses, []
        if len(losses) > 1:
            loss = self._reporting.run("averaging the loss", _mean, losses)
        report = super().step(loss, step=step, scalars=scalars)
        if self._feed is not None:
            self._report(self._reporting.run("reporting metrics", self._feed.after, report, self))
        return report

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; `accelerator.load_state` calls it.

        Raises:
            ConfigurationError: this is no state of a monitor, or one of another version.
        """
        if processes.rank() > 0 and isinstance(state, Mapping) and "scalars" in state:
            state = {**state, "scalars": []}  # checkpoints hold the first rank's: they are its own
        super().load_state_dict(state)

    def close(self, timeout: float = 30.0) -> None:
        """Deliver what is left and leave model and optimizer as they were; before `end_training()`.

        Args:
            timeout: seconds to wait for the sinks.
        """
        if not self._closed and self._feed is not None:
            self._report(self._reporting.run("reporting metrics", self._feed.rest, self))
        super().close(timeout)

    def _report(self, found: Sequence[tuple[int, dict[str, float]]] | None) -> None:
        for step, metrics in found or ():
            for tracker in self._accelerator.trackers:
                # W&B drops what comes at a step below its last one, and how the user counts is not known:
                # without a commit the metrics join the row that the user's own log is at.
                place = {"commit": False} if tracker.name == "wandb" else {"step": step}
                self._reporting.run(f"reporting to {tracker.name}", tracker.log, dict(metrics), **place)


def attach(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    run_dir: str | os.PathLike[str] | None = None,
    every: int | Literal["auto"] = "auto",
    rows: int | Literal["all", "auto"] = "auto",
    budget: float | None = BUDGET,
    loggers: Sequence[Sink | MetricFunction] = (),
    on_alert: Callable[[Alert], object] | None = None,
    thresholds: Thresholds | None = None,
    owners: Sequence[str] = (),
) -> AcceleratedMonitor:
    """Watch a model that is trained with an accelerator; call after `accelerator.prepare`.

    Call the monitor's `step(loss)` after each `optimizer.step()`, batches that only accumulate gradients
    included. The aggregates of each measured step go to the accelerator's trackers, as
    `attention/all/entropy_min`, `attention/layer_03/entropy_mean` and so on, at the number of the optimizer
    step; in W&B they join the row of your own latest `accelerator.log`. `accelerator.save_state` and
    `load_state` keep the monitor's state: attach before you load. Only the main process logs and tells of
    alerts.

    Args:
        accelerator: of the training.
        model: prepared or not.
        optimizer: prepared or not, or a list, for gradients and updates of the attention weights.
        run_dir: where the run is kept; by default `entropy_monitor` below `accelerator.project_dir`, or a
            fresh directory below `runs/` where there is none.
        every: optimizer steps between measurements, or "auto"; see `EntropyMonitor`.
        rows: query rows to read of each sequence, spread evenly; "all", or "auto".
        budget: share of the training's time that measuring may take, where "auto" has the choice.
        loggers: sinks of your own, and functions of metrics and step, beside the accelerator's trackers.
        on_alert: called with each alert that opens or becomes more severe.
        thresholds: of the analyzer.
        owners: name patterns (`blocks.*.attn`) of modules in which any softmax counts as attention.

    Returns:
        The monitor.

    Raises:
        MissingExtraError: accelerate is not installed (on import).
        ConfigurationError: an argument is not usable.
        AttentionNotFoundError: the model has no attention that can be seen.
        RunDirectoryError: `run_dir` cannot be used.

    Example:
        >>> model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        >>> monitor = attach(accelerator, model, optimizer, every=10, on_alert=print)
        >>> for batch in loader:
        ...     with accelerator.accumulate(model):
        ...         loss = model(batch).mean()
        ...         accelerator.backward(loss)
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        ...         monitor.step(loss)
        >>> monitor.close()
    """
    if not isinstance(accelerator, Accelerator):
        raise ConfigurationError(
            f"accelerator must be an accelerate.Accelerator, got {type(accelerator).__name__}"
        )
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    optimizers = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    for given in optimizers:
        if given is not None and not isinstance(given, Optimizer):
            raise ConfigurationError(f"optimizer must be a torch.optim.Optimizer, got {type(given).__name__}")
    settings = Settings(run_dir, every, rows, budget, loggers, on_alert, thresholds, owners)
    inner: nn.Module = accelerator.unwrap_model(model)
    folder = None if accelerator.project_dir is None else Path(accelerator.project_dir) / _FOLDER
    sink = MetricSink()
    arguments = settings.arguments(inner, [o for o in optimizers if o is not None], sink, folder)
    monitor = AcceleratedMonitor(inner, accelerator, sink, **arguments)
    accelerator.register_for_checkpointing(monitor)
    return monitor


def _mean(losses: Sequence[Any]) -> Any:
    return sum(losses) / len(losses)
