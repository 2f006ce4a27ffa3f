"""`EntropyMonitor`: the one object that a training loop holds."""

from __future__ import annotations

import atexit
import logging
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from entropy_monitor import options as opt
from entropy_monitor import processes, run_info
from entropy_monitor.alerting import Alerting
from entropy_monitor.analyzer import Analyzer, Thresholds
from entropy_monitor.coverage import Coverage, as_plan
from entropy_monitor.delivery import Delivery, open_sinks
from entropy_monitor.describe import Description
from entropy_monitor.errors import AttentionNotFoundError
from entropy_monitor.guard import Guard
from entropy_monitor.hooks import Harvest, Recorder, Watcher, WeightWatcher
from entropy_monitor.hooks.weights import UPDATE_FIGURES
from entropy_monitor.looking import check_model
from entropy_monitor.pipeline import Pipeline
from entropy_monitor.plan import BUDGET, Plan
from entropy_monitor.records import Alert, Record, Sink
from entropy_monitor.scalars import Number, check_scalars
from entropy_monitor.schedule import Schedule
from entropy_monitor.step_report import StepReport
from entropy_monitor.store import RunWriter, next_session
from entropy_monitor.trackers import MetricFunction

__all__ = ["EntropyMonitor", "StepReport"]

_STATE_VERSION = 2
_STORE_CAPACITY = 65_536  # records and alerts that may wait for the disk
_SINK_CAPACITY = 1_024  # and for a logger
_ENDING = "ending a step"
_MISSED_TOLD = 20  # steps without a reading after which the user is told

logger = logging.getLogger("entropy_monitor")

_open: weakref.WeakSet[EntropyMonitor] = weakref.WeakSet()


class EntropyMonitor:
    """Watches the attention of a model in training.

    Call `step(loss)` once after every `optimizer.step()`. Every `every` steps the training's own forward is
    measured; nothing is added to other steps. Forwards in eval mode or without gradients are left out. After
    the first `step()` nothing raises: what fails is logged once, counted in `faults` and left out.

    What you give for `every` and `rows` is kept; "auto" adapts to what is measured, and says so in the log.
    The first eight measurements read everything. After them weights, gradients, updates and the floors that
    rest on norms are read in one of four, and in layers with an alert or a first sign of one; they are null
    elsewhere.

    In distributed training every rank measures and stores what it holds; loggers and `on_alert` are rank 0's.

    Args:
        model: the model that is trained.
        optimizer: its optimizer (or a list), for gradients and updates of the attention weights; without it
            those columns are null.
        run_dir: where the run is kept; None makes a fresh directory below `runs/`. One that holds a run of
            the same model is continued.
        every: steps between measurements. "auto": one step in 10, and in 20, 40, … up to 160 while measuring
            takes more than the budget; where in each block of so many steps changes from block to block. The
            first sign of trouble in a layer brings the next measurements back to one step in 10.
        rows: query rows to read of each sequence, spread evenly, in places that change with the step; or
            "all". "auto": 32, or 64 where a batch is one sequence; twice, four times, … as many while their
            standard error is above a third of the batch-to-batch spread.
        budget: share of the training's time that measuring may take, where `every` is "auto"; what it takes
            is found by comparing the durations of whole steps. None: `every` stays 10. In distributed
            training "auto" does not adapt: ranks must measure the same, and know nothing of one another's
            clocks.
        loggers: sinks such as `TensorBoardLogger` and `WandbLogger`, and functions that take the metrics of
            a measured step (a dict from name to number) and the step; each is served by a thread of its own.
        on_alert: called with each alert that opens or becomes more severe, for example `print`; called within
            `step()`, so it should be quick.
        thresholds: of the analyzer.
        owners: name patterns (`blocks.*.attn`) of modules in which any softmax counts as attention.
        example_inputs: inputs of one forward, to find the attention now and not in the first training step:
            a tuple of positional, or a dict of keyword arguments.

    Raises:
        ConfigurationError: an argument is not usable.
        AttentionNotFoundError: the model has no attention that can be seen; from `step()` where only the
            first forward can tell.
        RunDirectoryError: `run_dir` cannot be used.

    Example:
        >>> monitor = EntropyMonitor(model, optimizer=optimizer, run_dir="runs/a", on_alert=print)
        >>> for batch in loader:
        ...     loss = model(batch).mean()
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     monitor.step(loss)
        >>> monitor.close()
    """

    _closed = True  # until everything is in place

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        run_dir: str | os.PathLike[str] | None = None,
        every: int | Literal["auto"] = "auto",
        rows: int | Literal["all", "auto"] = "auto",
        budget: float | None = BUDGET,
        loggers: Sequence[Sink | MetricFunction] = (),
        on_alert: Callable[[Alert], object] | None = None,
        thresholds: Thresholds | None = None,
        owners: Sequence[str] = (),
        example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    ) -> None:
        check_model(model)
        opt.check_wrapper(model)
        opt.check_alone(model, list(_open))
        every = opt.check_every(every)
        rows = opt.check_row_choice(rows)
        budget = opt.check_budget(budget)
        sinks = opt.check_sinks(loggers)
        optimizers = opt.check_optimizers(optimizer, model)
        opt.check_on_alert(on_alert)
        limits = opt.check_thresholds(thresholds)
        opt.check_attention(model, owners, example_inputs)
        description = run_info.describe_model(model)
        self.run_dir = opt.check_run_path(run_dir, model, description)
        rank = processes.rank()
        if rank > 0:
            sinks, on_alert = (), None

        self._model = model
        self._guard = Guard()
        self._plan = Plan(rows, every, budget, fixed=processes.is_distributed())
        self._schedule = Schedule(self._plan.every, spread=self._plan.every_moves)
        self._recorder = Recorder(self._plan.rows, adapt_to_batch=self._plan.adapt_to_batch)
        self._watcher = Watcher(model, self._recorder, self._guard, owners=owners, training_only=True)
        self._coverage = Coverage(model, self._recorder, self._watcher, self._guard)
        self._alerting = Alerting(Analyzer(limits), self._guard, on_alert)
        self._plan_is_new = False
        self._confirmed = False
        self._resumed = False
        self._missed = 0
        self._pid = os.getpid()

        # What may fail comes last, and the store last of it: an error leaves no run behind.
        self._store = RunWriter(self.run_dir, rank=rank)
        settings = run_info.settings(every, rows, budget, owners, optimizers, limits)
        launch = processes.launch(self.run_dir)
        session = next_session(self.run_dir, description, rank, launch)
        info = run_info.run_info(description, settings, self.run_dir, session, rank, launch)
        open_sinks(info, (*sinks, self._store))
        self._delivery = Delivery([(self._store, _STORE_CAPACITY), *((s, _SINK_CAPACITY) for s in sinks)])
        self._pipeline = Pipeline(
            self._alerting, self._delivery, self._guard, _observing(self._plan, self._alerting)
        )
        self._weights = WeightWatcher(optimizers, self._recorder.layers, self._guard)
        self._closed = False
        _open.add(self)
        # Last in, first out: what the sinks registered (W&B does) must run after our closing.
        atexit.unregister(_close_all)
        atexit.register(_close_all)
        self._arm()

    @property
    def open_alerts(self) -> tuple[Alert, ...]:
        """The alerts that are open now."""
        return self._alerting.open_alerts

    @property
    def model(self) -> nn.Module:
        """The model that is watched."""
        return self._model

    def describe(self) -> Description:
        """What was found in the model: owners, sources, heads, masks, projections; and what is not covered.

        Print it; `.frame` is a DataFrame. Complete after the first measured step. Waits for the device.
        """
        return self._coverage.describe(self._plan)

    @property
    def faults(self) -> dict[str, int]:
        """How often each part of the monitor failed; empty when all is well."""
        return {**self._guard.faults, **self._delivery.faults}

    @property
    def dropped(self) -> dict[str, int]:
        """How many records and alerts each sink missed because it could not keep up."""
        return self._delivery.dropped

    def step(
        self,
        loss: Number | None = None,
        *,
        step: int | None = None,
        scalars: Mapping[str, Number] | None = None,
    ) -> StepReport:
        """End a training step; call after `optimizer.step()`.

        Args:
            loss: the step's loss; on an accelerator it stays there until the next copy.
            step: the step's number; counted from 0 by default.
            scalars: more numbers to keep, by name.

        Returns:
            What the step brought.

        Raises:
            AttentionNotFoundError: in the first call, where no attention was seen in the step's forward.
            ConfigurationError: in the first call, where an argument is not usable.
        """
        if self._closed or os.getpid() != self._pid:  # a forked worker has no threads to deliver with
            return StepReport(self._schedule.next if step is None else step, False)
        if not self._confirmed and not self._confirm(loss, step, scalars):
            return StepReport(self._schedule.next if step is None else step, False)
        report = self._guard.run(_ENDING, self._end_step, loss, step, scalars)
        if report is None and self._guard.is_off(_ENDING):
            self._let_go()
        return report or StepReport(self._schedule.next if step is None else step, False)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold to go on as if never stopped: JSON-able. Waits for the device."""
        state = self._pipeline.state_dict()
        return {
            "version": _STATE_VERSION,
            "schedule": self._schedule.state_dict(),
            "plan": self._plan.state_dict(),
            **state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; call before the first forward.

        Raises:
            ConfigurationError: this is no state of a monitor, or one of another version.
        """
        opt.check_state(state, _STATE_VERSION)
        # What is damaged shows before anything is taken over.
        opt.check_part(state, "schedule", Schedule(1).load_state_dict)
        opt.check_part(state, "plan", Plan("auto", "auto").load_state_dict)
        self._resumed = True
        self._pipeline.load_state_dict(state)
        self._schedule.load_state_dict(state["schedule"])
        self._plan.load_state_dict(state["plan"])
        self._follow_plan()
        if not self._closed:
            self._arm()

    def close(self, timeout: float = 30.0) -> None:
        """Deliver what is left and leave model and optimizer as they were. Safe to call twice.

        Args:
            timeout: seconds to wait for the sinks.
        """
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        _open.discard(self)
        self._let_go()
        self._guard.run("closing", self._pipeline.close, timeout)

    def __enter__(self) -> EntropyMonitor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _arm(self) -> None:
        """Measure the next forward."""
        suspects, in_full = self._alerting.suspects, self._schedule.in_full
        self._recorder.begin(self._schedule.next, suspects, in_full=in_full)
        self._weights.arm(None if in_full else suspects)
        self._watcher.rows_alone = not in_full and not suspects and not self._missed
        self._watcher.arm()

    def _let_go(self) -> None:
        """Leave model and optimizer as they were."""
        self._guard.run("leaving the model", self._watcher.disarm)
        self._guard.run("leaving the optimizer", self._weights.close)
        self._guard.run("forgetting figures", self._recorder.begin, self._schedule.next)

    def _confirm(self, loss: object, step: object, scalars: object) -> bool:
        """The last moment at which a mistake may raise; returns whether there is anything to watch."""
        check_scalars(loss, scalars)
        opt.check_step(step)
        if self._recorder.is_empty:
            text = self._coverage.why_nothing()
            self.close()
            if processes.is_distributed():  # other ranks may have some, and would wait for this one for ever
                logger.warning("entropy-monitor: this rank is not watched. %s", text)
                return False
            raise AttentionNotFoundError(text)
        self._confirmed = True
        first_rank = self._store.rank == 0
        if first_rank and self._store.session and not self._resumed and not step and not self._schedule.next:
            logger.warning(
                "entropy-monitor: %s holds an earlier session of this run; this one counts from 0 again "
                "and takes its place in what load_run shows (nothing is deleted). To go on from a checkpoint "
                "give step= or call load_state_dict()",
                self.run_dir,
            )
        return True

    def _end_step(
        self, loss: Number | None, step: int | None, scalars: Mapping[str, Number] | None
    ) -> StepReport:
        now = self._schedule.number(step)
        self._pipeline.keep(now, loss, scalars)
        measured = self._watcher.armed and self._schedule.due and not self._recorder.is_empty
        if measured:
            self._guard.run("gathering figures", self._send_figures, now)
            self._guard.run("looking at what is covered", self._look_at_coverage)
        self._tell_if_blind(measured)
        self._pipeline.receive()  # first: what is suspected and planned holds for the step that is armed now
        self._guard.run("planning", self._revise_plan, now, measured)
        self._schedule.end(now, measured)
        if self._schedule.due:
            self._arm()
        elif self._watcher.armed:
            self._watcher.disarm()
            self._weights.disarm()
        return StepReport(now, measured, self._pipeline.take_events())

    def _tell_if_blind(self, measured: bool) -> None:
        """Say so, once, when step after step was to be measured and could not."""
        self._missed = 0 if measured or not self._schedule.due else self._missed + 1
        if self._missed == _MISSED_TOLD:
            skipped = ", ".join(f"{n} {why}" for why, n in self._watcher.sightings.skipped.items())
            logger.warning(
                "entropy-monitor: nothing could be measured in %d steps; forwards left out so far: %s",
                _MISSED_TOLD,
                skipped or "none, and no other was seen",
            )

    def _look_at_coverage(self) -> None:
        if self._coverage.news() or self._plan_is_new:  # which tells what has been read by now
            self._plan_is_new = False
            self._keep_plan()

    def _keep_plan(self) -> None:
        """Keep how the run is measured; the store's thread does, for disks and devices are waited for."""
        snapshot = self._coverage.snapshot(self._plan)
        self._delivery.call(self._store, lambda: self._store.describe(as_plan(snapshot())))

    def _revise_plan(self, now: int, measured: bool) -> None:
        change = self._plan.end(measured, self._schedule.in_full)
        if change is not None:
            self._plan_is_new = True
            text = f"entropy-monitor: from step {now + 1} on {change.text}"
            if change.is_rarer:
                logger.warning("%s. Give every= or a larger budget= to measure more often", text)
            else:
                logger.info("%s", text)
        self._follow_plan()

    def _follow_plan(self) -> None:
        self._schedule.every, self._recorder.rows = self._plan.every_now, self._plan.rows

    def _send_figures(self, now: int) -> None:
        harvest = replace(self._recorder.harvest(), step=now)
        updates = self._guard.run("reading updates", self._updates, harvest)
        if updates is None:
            updates = torch.full((len(harvest.layers), len(UPDATE_FIGURES)), torch.nan)
        self._pipeline.send(now, harvest, updates)

    def _updates(self, harvest: Harvest) -> Tensor:
        return self._weights.figures([name for name, _ in harvest.layers], harvest.figures.device)


def _observing(plan: Plan, alerting: Alerting) -> Callable[[Harvest, Record], None]:
    """Shows a plan each record, without holding the monitor, which ends when nobody else does."""

    def observe(harvest: Harvest, record: Record) -> None:
        entropy, error = (np.asarray(record.heads[name]) for name in ("entropy", "entropy_se"))
        plan.observe(harvest.index, entropy, error)
        plan.suspect(alerting.suspects)

    return observe


@atexit.register
def _close_all() -> None:
    for monitor in list(_open):
        monitor.close()
