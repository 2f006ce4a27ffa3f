"""The monitor as a callback of Hugging Face's `Trainer`."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from entropy_monitor.analyzer import Thresholds
from entropy_monitor.callbacks.metrics import MetricFeed, MetricSink
from entropy_monitor.callbacks.settings import Settings
from entropy_monitor.callbacks.state_file import read_state, write_state
from entropy_monitor.errors import MissingExtraError
from entropy_monitor.guard import Guard
from entropy_monitor.monitor import EntropyMonitor
from entropy_monitor.plan import BUDGET, EVERY
from entropy_monitor.records import Alert, Sink
from entropy_monitor.trackers import MetricFunction

try:
    from transformers.trainer_callback import (
        CallbackHandler,
        PrinterCallback,
        ProgressCallback,
        TrainerCallback,
    )
except ImportError as error:
    raise MissingExtraError("transformers", "huggingface", "EntropyMonitorCallback") from error

logger = logging.getLogger("entropy_monitor")

_FOLDER = "entropy_monitor"  # below output_dir
_MOST_ENTRIES = 1_000  # in log_history, which every checkpoint holds
_DEEPEST = 25  # frames between the Trainer and a callback's event
_KEPT = ("grad_norm", "learning_rate")  # of what the Trainer logs with the loss


class EntropyMonitorCallback(TrainerCallback):
    """Watches the attention of the model that a `transformers.Trainer` trains.

    Every optimizer step is a step of the monitor: row `s` is the forward before update `s`, that of
    `global_step` `s + 1`. Evaluation and prediction are left out. The aggregates of each measured step go to
    `trainer.state.log_history` and to whatever `report_to` names, as `attention/all/entropy_min`,
    `attention/layer_03/entropy_mean` and so on, at the `global_step` that the step led to; `attention/step`
    is the row's own number. In a long training they are thinned to about a thousand entries. The console is
    left alone.

    Its state lies in the Trainer's checkpoints: a training that is resumed from one goes on in the same run
    directory with the same alerts. The loss is the mean that the Trainer logs, at its steps.

    Args:
        run_dir: where the run is kept; by default `entropy_monitor` below `args.output_dir`.
        every: optimizer steps between measurements, or "auto"; see `EntropyMonitor`.
        rows: query rows to read of each sequence, spread evenly; "all", or "auto".
        budget: share of the training's time that measuring may take, where "auto" has the choice.
        loggers: sinks of your own, and functions of metrics and step, beside what `report_to` names.
        on_alert: called with each alert that opens or becomes more severe.
        thresholds: of the analyzer.
        owners: name patterns (`blocks.*.attn`) of modules in which any softmax counts as attention.

    Attributes:
        monitor: of the training that runs or ran last; None before the first.

    Raises:
        MissingExtraError: transformers is not installed (on import).
        ConfigurationError: an argument is not usable.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[EntropyMonitorCallback(every=10)])
        >>> trainer.train()
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
        self.monitor: EntropyMonitor | None = None
        self._settings = Settings(run_dir, every, rows, budget, loggers, on_alert, thresholds, owners)
        self._sink = MetricSink()
        self._guard = Guard()
        self._feed: MetricFeed | None = None
        self._handler: CallbackHandler | None = None
        self._ended: int | None = None  # an optimizer step that the monitor has not been told of
        self._thinning = 1
        self._reported = 0
        self._own = False  # whether what is logged is ours

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Make the monitor, and put it where a checkpoint left it."""
        if self.monitor is not None:  # an earlier training that an error ended: there is no event for that
            self.monitor.close()
        callers = list(_callers())
        handlers = (f.f_locals.get("self") for f in callers)
        mine = (h for h in handlers if isinstance(h, CallbackHandler) and self in h.callbacks)
        self._handler = next(mine, None)
        model, optimizer = kwargs["model"], kwargs.get("optimizer")
        folder = Path(args.output_dir) / _FOLDER
        if getattr(state, "is_hyper_param_search", False) and state.trial_name:
            folder /= str(state.trial_name)
        optimizers = [] if optimizer is None else [optimizer]
        self._sink, self._guard, self._ended, self._reported = MetricSink(), Guard(), None, 0
        self.monitor = EntropyMonitor(
            model, **self._settings.arguments(model, optimizers, self._sink, folder)
        )
        self._feed = MetricFeed(model, self._sink)
        every = EVERY if self._settings.every == "auto" else self._settings.every
        self._thinning = max(1, state.max_steps // every // _MOST_ENTRIES)
        if state.global_step > 0:
            given = next((f.f_locals["resume_from_checkpoint"] for f in callers if _resumes(f)), None)
            self._guard.run("resuming", self._resume, args, state, given)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the step before, if the Trainer did not log its loss after all."""
        self._end_step(args, state, control, kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the step, unless the Trainer is about to log its loss."""
        self._ended = state.global_step - 1
        # A checkpoint holds what log_history has before it is made.
        awaited = control.should_log or (args.logging_strategy == "epoch" and not control.should_save)
        if not awaited:
            self._end_step(args, state, control, kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """End the step with its loss; at the latest with the summary, after which trackers close."""
        if self._own or not isinstance(logs, dict):
            return
        if "loss" in logs:
            scalars = {name: logs[name] for name in _KEPT if isinstance(logs.get(name), (int, float))}
            self._end_step(args, state, control, kwargs, logs["loss"], scalars)
        elif "train_runtime" in logs:
            self._end_step(args, state, control, kwargs)
            self._guard.run("reporting metrics", self._report_rest, args, state, control, kwargs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the monitor's state into the checkpoint."""
        self._end_step(args, state, control, kwargs)
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.monitor is not None and folder.is_dir():
            self._guard.run("saving its state", write_state, folder, self.monitor.state_dict)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Deliver what is left."""
        self._end_step(args, state, control, kwargs)
        if self.monitor is not None:
            self.monitor.close()
        self._handler = None

    def _resume(self, args: Any, state: Any, given: str | None) -> None:
        usual = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        folders = [given, args.resume_from_checkpoint, usual]
        kept = next((s for f in folders if isinstance(f, (str, Path)) and (s := read_state(Path(f)))), None)
        if kept is None:
            logger.warning(
                "entropy-monitor: the checkpoint of step %d holds no state of the monitor: alerts start anew",
                state.global_step,
            )
        elif self.monitor is not None:
            self.monitor.load_state_dict(kept)

    def _end_step(
        self,
        args: Any,
        state: Any,
        control: Any,
        around: dict[str, Any],
        loss: Any = None,
        scalars: dict[str, Any] | None = None,
    ) -> None:
        """Tell the monitor of a step that ended, and the trackers of what it found."""
        step, self._ended = self._ended, None
        if step is None or self.monitor is None or self._feed is None:
            return
        report = self.monitor.step(loss, step=step, scalars=scalars)  # its first call may raise, no other
        found = self._guard.run("reporting metrics", self._feed.after, report, self.monitor)
        for _, metrics in found or ():
            self._guard.run("reporting metrics", self._report, metrics, args, state, control, around)

    def _report_rest(self, args: Any, state: Any, control: Any, around: dict[str, Any]) -> None:
        if self.monitor is not None and self._feed is not None:
            for _, metrics in self._feed.rest(self.monitor):
                self._report(metrics, args, state, control, around)

    def _report(
        self, metrics: dict[str, float], args: Any, state: Any, control: Any, around: dict[str, Any]
    ) -> None:
        """Do what `Trainer.log` does, for all but what prints."""
        self._reported += 1
        if (self._reported - 1) % self._thinning:
            return
        logs = {**metrics, "epoch": state.epoch}
        last = state.log_history[-1:]
        # The summary stays last: people read it there.
        place = len(state.log_history) - bool(last and "train_runtime" in last[0])
        state.log_history.insert(place, {**logs, "step": state.global_step})
        callbacks = [] if self._handler is None else self._handler.callbacks
        self._own = True
        try:
            for callback in callbacks:
                if callback is not self and not isinstance(callback, (PrinterCallback, ProgressCallback)):
                    part = f"reporting to {type(callback).__name__}"
                    self._guard.run(part, callback.on_log, args, state, control, logs=dict(logs), **around)
        finally:
            self._own = False


def _callers() -> Iterator[FrameType]:
    """The frames that called, nearest first.

    A callback is given neither the trackers that `report_to` made nor the checkpoint's folder, and trackers
    run before it: only the Trainer's own calls tell where both are.
    """
    frame = inspect.currentframe()
    for _ in range(_DEEPEST):
        frame = None if frame is None else frame.f_back
        if frame is None:
            return
        yield frame


def _resumes(frame: FrameType) -> bool:
    return isinstance(frame.f_locals.get("resume_from_checkpoint"), str)
