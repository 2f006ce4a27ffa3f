"""`EntropyMonitor`: the one object that a training loop holds."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from entropy_monitor import options as opt
from entropy_monitor.analyzer import Analyzer, Thresholds
from entropy_monitor.capture import check_model, check_owners, check_rows, not_found
from entropy_monitor.delivery import Delivery
from entropy_monitor.errors import AttentionNotFoundError, ConfigurationError
from entropy_monitor.guard import Guard
from entropy_monitor.hooks import Harvest, Recorder, Watcher, WeightWatcher
from entropy_monitor.records import Alert, AlertEvent, Record, RunInfo, Sink
from entropy_monitor.scalars import Number, ScalarLog, check_scalars
from entropy_monitor.store import RunWriter, check_run_dir
from entropy_monitor.transfer import Transfer, pack

logger = logging.getLogger("entropy_monitor")

_SEVERITIES = ("info", "warning", "severe")
_STATE_VERSION = 1


@dataclass(frozen=True)
class StepReport:
    """What one `step()` brought.

    Attributes:
        step: the training step that ended.
        measured: whether its forward was measured.
        events: alerts that opened, changed or closed. On an accelerator they may come one `step()` late;
            each says at which step it was measured.
    """

    step: int
    measured: bool
    events: tuple[AlertEvent, ...] = ()

    @property
    def alerts(self) -> tuple[Alert, ...]:
        """The alerts that opened."""
        return tuple(e.alert for e in self.events if e.event == "opened")


class EntropyMonitor:
    """Watches the attention of a model in training.

    Call `step(loss)` once after every `optimizer.step()`. Every `every` steps the training's own forward is
    measured; nothing is added to other steps. After the first `step()` nothing raises: what fails is logged once
    and left out.

    Args:
        model: the model that is trained.
        optimizer: its optimizer (or a list), for gradients and updates of the attention weights; without it those
            columns are null.
        run_dir: where the run is kept; None makes a fresh directory below `runs/`. One that holds a run of the
            same model is continued.
        every: steps between measurements.
        rows: query rows to read of each sequence, evenly spaced, in places that change with the step; or "all".
        loggers: sinks such as `TensorBoardLogger` and `WandbLogger`.
        on_alert: called with each alert that opens or becomes more severe, for example `print`.
        thresholds: of the analyzer.
        owners: name patterns (`blocks.*.attn`) of modules in which any softmax counts as attention.
        example_inputs: inputs of one forward, to find the attention now and not in the first training step:
            a tuple of positional, or a dict of keyword arguments.

    Raises:
        ConfigurationError: an argument is not usable.
        AttentionNotFoundError: the model has no attention that can be seen; from `step()` where only the first
            forward can tell.
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

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        run_dir: str | os.PathLike[str] | None = None,
        every: int = 10,
        rows: int | Literal["all"] = 32,
        loggers: Sequence[Sink] = (),
        on_alert: Callable[[Alert], object] | None = None,
        thresholds: Thresholds | None = None,
        owners: Sequence[str] = (),
        example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    ) -> None:
        check_model(model)
        opt.check_every(every)
        check_rows(rows)
        sinks = opt.check_sinks(loggers)
        optimizers = opt.check_optimizers(optimizer, model)
        if on_alert is not None and not callable(on_alert):
            raise ConfigurationError(f"on_alert must be callable, such as print, got {on_alert!r}")
        check_owners(model, owners)
        if example_inputs is None:
            opt.check_structure(model, owners)
        else:
            _probe(model, example_inputs, owners)
        self.run_dir = opt.resolve_run_dir(None if run_dir is None else Path(run_dir), model)
        check_run_dir(self.run_dir, opt.describe_model(model))

        self._model = model
        self._every = every
        self._on_alert = on_alert
        self._guard = Guard()
        self._analyzer = Analyzer(thresholds or Thresholds())
        self._recorder = Recorder(rows, keep_evidence=True)
        self._watcher = Watcher(model, self._recorder, self._guard, owners=owners, training_only=True)
        self._weights = WeightWatcher(optimizers, self._recorder.layers, self._guard)
        self._scalars = ScalarLog()
        self._transfer = Transfer()
        self._severity: dict[str, int] = {}
        self._step = 0
        self._confirmed = False
        self._closed = False
        self._pid = os.getpid()

        self._store = RunWriter(self.run_dir, rank=_rank())
        info = RunInfo(
            model=opt.describe_model(model),
            options={"every": every, "rows": rows, "owners": list(owners)},
            versions=opt.versions(),
            run_dir=str(self.run_dir),
            rank=_rank(),
        )
        try:
            self._delivery = Delivery(_opened(info, self._store, sinks))
        except BaseException:
            self._weights.close()
            raise
        atexit.register(self.close)
        self._arm()

    @property
    def open_alerts(self) -> tuple[Alert, ...]:
        """The alerts that are open now."""
        return self._analyzer.open_alerts

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
            loss: the step's loss; a tensor stays on its device until the next copy.
            step: the step's number; counted from 0 by default.
            scalars: more numbers to keep, by name.

        Returns:
            What the step brought.

        Raises:
            AttentionNotFoundError: in the first call, where no attention was seen in the step's forward.
            ConfigurationError: in the first call, where loss or scalars are not numbers.
        """
        now = self._step if step is None else step
        if self._closed:
            return StepReport(now, False)
        if not self._confirmed:
            self._confirm(loss, scalars)
        measured = self._watcher.armed and not self._recorder.is_empty
        report = self._guard.run("step", self._finish_step, now, loss, scalars, measured)
        self._step = now + 1
        if self._step % self._every == 0 or (self._watcher.armed and not measured):
            self._guard.run("step", self._arm)
        return report or StepReport(now, False)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold to go on as if never stopped: JSON-able."""
        self._receive(wait=True)
        return {"version": _STATE_VERSION, "step": self._step, "analyzer": self._analyzer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; call before the first forward.

        Raises:
            ConfigurationError: the state is not one of this package's version.
        """
        if state.get("version") != _STATE_VERSION:
            raise ConfigurationError(
                f"this monitor state has version {state.get('version')!r}, this package reads {_STATE_VERSION}"
            )
        self._analyzer.load_state_dict(state["analyzer"])
        self._severity = {a.id: _SEVERITIES.index(a.severity) for a in self._analyzer.open_alerts}
        self._step = int(state["step"])
        self._arm()

    def close(self, timeout: float = 30.0) -> None:
        """Deliver what is left and leave the model as it was. Safe to call twice.

        Args:
            timeout: seconds to wait for the sinks.
        """
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        self._watcher.disarm()
        self._weights.close()
        self._guard.run("close", self._receive, wait=True)
        self._guard.run("close", self._send_left_scalars)
        self._delivery.close(timeout)
        atexit.unregister(self.close)

    def __enter__(self) -> EntropyMonitor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _arm(self) -> None:
        """Measure the next forward."""
        self._recorder.begin(self._step)
        self._weights.forget()
        self._weights.armed = True
        self._watcher.arm()

    def _confirm(self, loss: Number | None, scalars: Mapping[str, Number] | None) -> None:
        """The last moment at which a mistake may raise."""
        check_scalars(loss, scalars)
        if self._recorder.is_empty:
            sightings = self._watcher.sightings
            self.close()
            raise AttentionNotFoundError(not_found(self._model, sightings))
        self._confirmed = True
        self._guard.run("describing the run", self._store.describe, self._plan())

    def _plan(self) -> dict[str, Any]:
        return {
            name: {
                "layer_index": parts.index,
                "heads": parts.heads,
                "source": parts.source,
                "projections": dict(parts.projections),
            }
            for name, parts in self._recorder.layers.items()
        }

    def _finish_step(
        self,
        now: int,
        loss: Number | None,
        scalars: Mapping[str, Number] | None,
        measured: bool,
    ) -> StepReport:
        self._scalars.add(now, loss, scalars)
        if measured:
            self._watcher.disarm()
            self._weights.armed = False
            harvest = replace(self._recorder.harvest(), step=now)
            device = harvest.figures.device
            updates = torch.stack([self._weights.figures(name, device) for name, _ in harvest.layers])
            self._transfer.send(pack(harvest, updates, self._scalars))
            self._weights.forget()
        return StepReport(now, measured, tuple(self._receive()))

    def _receive(self, wait: bool = False) -> list[AlertEvent]:
        """Analyse and pass on what has arrived from the device."""
        events: list[AlertEvent] = []
        for harvest, record in self._transfer.receive(wait):
            self._delivery.send(record)
            found = self._guard.run("analysing", self._analyzer.update, record) or []
            for event in found:
                event = self._guard.run("keeping an attention map", self._with_map, event, harvest) or event
                self._delivery.send(event)
                self._tell(event)
                events.append(event)
        return events

    def _with_map(self, event: AlertEvent, harvest: Harvest) -> AlertEvent:
        """The event with the attention map of its worst head, pooled."""
        evidence = event.alert.evidence
        maps = harvest.maps.get((event.alert.layer, evidence.get("call", 0)))
        if event.event == "closed" or maps is None or "worst_head" not in evidence or "map" in evidence:
            return event
        picture = maps[evidence["worst_head"]].float().cpu()
        alert = self._analyzer.attach(event.alert.id, map=_rounded(picture))
        return replace(event, alert=alert)

    def _tell(self, event: AlertEvent) -> None:
        """Call `on_alert` when an alert opens or gets worse."""
        now = _SEVERITIES.index(event.alert.severity)
        before = self._severity.get(event.alert.id, -1)
        self._severity[event.alert.id] = max(now, before)
        if self._on_alert is not None and event.event != "closed" and now > before:
            self._guard.run("on_alert", self._on_alert, event.alert)

    def _send_left_scalars(self) -> None:
        """Scalars of the steps after the last measured one go into the store without heads."""
        if len(self._scalars):
            from entropy_monitor.records import HEADS
            from entropy_monitor.scalars import scalar_columns

            rows, values = self._scalars.take(torch.device("cpu"))
            self._delivery.send(
                Record(rows[-1][0], HEADS.empty(), scalars=scalar_columns(rows, values.numpy()))
            )


def _rounded(picture: Tensor) -> list[list[float]]:
    return [[round(float(x), 4) for x in row] for row in picture.tolist()]


def _probe(
    model: nn.Module, example_inputs: tuple[Any, ...] | Mapping[str, Any], owners: Sequence[str]
) -> None:
    """Find the attention in one forward without gradients; the model is as before afterwards."""
    from entropy_monitor.capture import measure

    if isinstance(example_inputs, Mapping):
        measure(model, rows=1, owners=owners, **example_inputs)
    else:
        inputs = example_inputs if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
        measure(model, *inputs, rows=1, owners=owners)


def _opened(info: RunInfo, store: RunWriter, sinks: Sequence[Sink]) -> list[Sink]:
    """Open every sink; if one cannot work, close those before it and say so."""
    opened: list[Sink] = []
    try:
        store.open(info)
        opened.append(store)
        info = replace(info, session=store.session or 0)
        for sink in sinks:
            sink.open(info)
            opened.append(sink)
    except BaseException:
        for sink in opened:
            sink.close()
        raise
    return opened


def _rank() -> int:
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
