"""The monitor as a callback of Lightning, under both names that it is imported by."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from entropy_monitor import processes
from entropy_monitor.analyzer import Thresholds
from entropy_monitor.callbacks.metrics import MetricFeed, MetricSink
from entropy_monitor.callbacks.settings import Settings, fresh_dir
from entropy_monitor.errors import MissingExtraError
from entropy_monitor.guard import Guard
from entropy_monitor.monitor import EntropyMonitor
from entropy_monitor.plan import BUDGET
from entropy_monitor.records import Alert, Sink
from entropy_monitor.trackers import MetricFunction

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")
_FOLDER = "entropy_monitor"  # below the logger's folder


def _callback_classes() -> tuple[type, ...]:
    """The `Callback` of each that is installed: their Trainers know no other's, and both may be in use."""
    found: dict[type, None] = {}
    for package in _PACKAGES:
        try:
            found[importlib.import_module(package).Callback] = None
        except ImportError:
            continue
    if not found:
        raise MissingExtraError("lightning", "lightning", "EntropyMonitorCallback")
    return tuple(found)


if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    Callback = type("Callback", _callback_classes(), {})


class EntropyMonitorCallback(Callback):
    """Watches the attention of the module that a Lightning `Trainer` fits.

    It serves `lightning.pytorch` and `pytorch_lightning` alike. Each batch after which `trainer.global_step`
    has grown ends a step of the monitor: row `s` is the forward before update `s`, whatever is accumulated,
    and in manual optimization too. Rows have the numbers at which Lightning logs what `self.log` said of
    their batch. Validation, tests and predictions are left out. The aggregates of each measured step go to
    all of the Trainer's loggers, as `attention/all/entropy_min`, `attention/layer_03/entropy_mean` and so on.

    Its state lies in Lightning's checkpoints: `fit(ckpt_path=…)` goes on in the same run directory with the
    same alerts. The loss is what `training_step` returned.

    Args:
        run_dir: where the run is kept; by default `entropy_monitor` in the first logger's folder, or below
            `default_root_dir`.
        every: optimizer steps between measurements, or "auto"; see `EntropyMonitor`.
        rows: query rows to read of each sequence, spread evenly; "all", or "auto".
        budget: share of the training's time that measuring may take, where "auto" has the choice.
        loggers: sinks of your own, and functions of metrics and step, beside the Trainer's loggers.
        on_alert: called with each alert that opens or becomes more severe.
        thresholds: of the analyzer.
        owners: name patterns (`model.blocks.*.attn`) of modules in which any softmax counts as attention.

    Attributes:
        monitor: of the fit that runs or ran last; None before the first.

    Raises:
        MissingExtraError: Lightning is not installed (on import).
        ConfigurationError: an argument is not usable.

    Example:
        >>> trainer = lightning.Trainer(callbacks=[EntropyMonitorCallback(every=10, on_alert=print)])
        >>> trainer.fit(module, loader)
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str] | None = None,
        *,
        every: int | Literal["auto"] = "auto",
        rows: int | Literal["all", "auto"] = "auto",
        budget: float | None = BUDGET,
        loggers: Sequence[Sink | MetricFunction] = (),
        on_alert: Callable[[Alert], object] | None = None,
        thresholds: Thresholds | None = None,
        owners: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.monitor: EntropyMonitor | None = None
        self._settings = Settings(run_dir, every, rows, budget, loggers, on_alert, thresholds, owners)
        self._guard = Guard()
        self._feed: MetricFeed | None = None
        self._kept: dict[str, Any] = {}  # of a checkpoint, until the fit begins
        self._ended = 0  # optimizer steps that the monitor has been told of
        self._losses: list[Any] = []  # of the batches since

    @property
    def state_key(self) -> str:
        """Under which checkpoints hold the state, whatever a subclass is called."""
        return "entropy_monitor.EntropyMonitorCallback"

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the monitor, and put it where a checkpoint left it."""
        if self.monitor is not None:
            self.monitor.close()
        sink, self._guard = MetricSink(), Guard()
        kept, self._kept = self._kept, {}
        folder = Path(kept["run_dir"]) if kept.get("run_dir") else None
        if self._settings.run_dir is None and (folder is None or not folder.is_dir()):
            folder = fresh_dir(Path(trainer.log_dir or trainer.default_root_dir) / _FOLDER)
            folder = Path(trainer.strategy.broadcast(str(folder)))  # what the first rank found
        arguments = self._settings.arguments(pl_module, trainer.optimizers, sink, folder)
        self.monitor = EntropyMonitor(pl_module, **arguments)
        self._feed = MetricFeed(pl_module, sink)
        self._ended, self._losses = trainer.global_step, []
        if kept.get("monitor"):
            self._guard.run("resuming", self._resume, kept["monitor"])

    def on_train_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """End a step, if the batch led to an update."""
        if self.monitor is None or self._feed is None:
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, (int, float)) or (isinstance(loss, Tensor) and loss.numel() == 1):
            self._losses.append(loss.detach() if isinstance(loss, Tensor) else loss)
        if trainer.global_step <= self._ended:
            return
        # Of several optimizers Lightning counts each one's steps; its loggers count batches that stepped.
        step = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", self._ended)
        self._ended = trainer.global_step
        losses, self._losses = self._losses, []
        # Lightning has divided each by the number of batches that it accumulates.
        total = sum(losses) if pl_module.automatic_optimization else losses[-1] if losses else None
        report = self.monitor.step(total if losses else None, step=step)  # its first call may raise, no other
        found = self._guard.run("reporting metrics", self._feed.after, report, self.monitor)
        self._report(trainer, found or ())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        """Deliver what is left."""
        self._finish(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:  # noqa: ARG002
        """Deliver what is left, when an error or an interrupt ends the fit."""
        self._finish(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ARG002
        """Let the model go, whatever happened."""
        if self.monitor is not None and stage == "fit":
            self.monitor.close()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds: the monitor's state and its run directory."""
        if self.monitor is None:
            return self._kept
        state = self._guard.run("saving its state", self.monitor.state_dict)
        return {"monitor": state, "run_dir": str(self.monitor.run_dir)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what a checkpoint holds until the fit begins."""
        self._kept = dict(state_dict)

    def _resume(self, state: dict[str, Any]) -> None:
        if self.monitor is not None:
            # Checkpoints hold the first rank's state; scalars that wait in it are its own.
            self.monitor.load_state_dict(state if processes.rank() == 0 else {**state, "scalars": []})

    def _finish(self, trainer: Any) -> None:
        if self.monitor is None or self._feed is None:
            return
        self._report(trainer, self._guard.run("reporting metrics", self._feed.rest, self.monitor) or ())
        self._feed = None
        self.monitor.close()

    def _report(self, trainer: Any, found: Sequence[tuple[int, dict[str, float]]]) -> None:
        # Not `log_dict`: Lightning would drop what is not due by log_every_n_steps.
        for step, metrics in found:
            for logger in trainer.loggers:
                part = f"reporting to {type(logger).__name__}"
                self._guard.run(part, logger.log_metrics, dict(metrics), step=step)
