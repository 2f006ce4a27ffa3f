"""Records as they are made, and the few numbers of them that a framework's own trackers get."""

from __future__ import annotations

import threading
import time

from torch import nn

from entropy_monitor import processes
from entropy_monitor.dashboards.aggregates import PREFIX, aggregate_layers
from entropy_monitor.dashboards.whole_model import WholeModel
from entropy_monitor.monitor import EntropyMonitor, StepReport
from entropy_monitor.records import Record, RunInfo, Sink

LAYER_METRICS = ("entropy_mean", "entropy_min", "max_logit", "sigma_qk_max")
"""What trackers get of each layer; the run directory and the loggers have the rest."""

_PATIENCE = 1.0  # seconds to wait for a record that is already on its way between two threads


class MetricSink(Sink):
    """Turns records into metrics, on the monitor's thread, and keeps them until they are taken."""

    def __init__(self) -> None:
        self._arrival = threading.Condition()
        self._metrics: list[tuple[int, dict[str, float]]] = []
        self._latest = -1
        self._model = WholeModel()

    def open(self, info: RunInfo) -> None:  # noqa: ARG002
        """Forget an earlier run's."""
        with self._arrival:
            self._metrics, self._latest, self._model = [], -1, WholeModel()

    def log(self, record: Record) -> None:
        """Keep a record's metrics; one that holds only scalars has none."""
        metrics = tracker_metrics(record, self._model) if len(record.heads["head"]) else {}
        with self._arrival:
            if metrics:
                self._metrics.append((record.step, metrics))
            self._latest = max(self._latest, record.step)
            self._arrival.notify_all()

    def take(self, until: int | None = None) -> list[tuple[int, dict[str, float]]]:
        """Step and metrics of the records that have come since the last time.

        Args:
            until: wait, for a moment at most, for the record of this step.
        """
        deadline = time.monotonic() + _PATIENCE
        with self._arrival:
            if until is not None:
                self._arrival.wait_for(lambda: self._latest >= until, deadline - time.monotonic())
            taken, self._metrics = self._metrics, []
        return taken


class MetricFeed:
    """The metrics of a monitor, in the training's own thread.

    Args:
        model: that is watched.
        sink: is among the monitor's loggers.
    """

    def __init__(self, model: nn.Module, sink: MetricSink) -> None:
        self._sink = sink
        self._first = processes.rank() == 0  # the others' sinks get nothing
        # Elsewhere a record may still be on its way from the device, and is not waited for.
        self._at_once = all(p.device.type == "cpu" for p in model.parameters())
        self._measured: int | None = None

    def after(self, report: StepReport, monitor: EntropyMonitor) -> list[tuple[int, dict[str, float]]]:
        """Step and metrics of what has come by the end of a step, with the number of open alerts."""
        if report.measured:
            self._measured = report.step
        if not self._first or self._measured is None:
            return []
        taken = self._sink.take(report.step if report.measured and self._at_once else None)
        return [(step, _with_alerts(step, metrics, monitor)) for step, metrics in taken]

    def rest(self, monitor: EntropyMonitor) -> list[tuple[int, dict[str, float]]]:
        """What has not been taken yet; waits for the device."""
        if not self._first or self._measured is None:
            return []
        monitor.state_dict()  # receives what is on its way
        taken = self._sink.take(self._measured)
        return [(step, _with_alerts(step, metrics, monitor)) for step, metrics in taken]


def tracker_metrics(record: Record, model: WholeModel) -> dict[str, float]:
    """`attention/all/…` and `attention/layer_03/…` of a record, under the names of the dashboards.

    Of each layer only `LAYER_METRICS`: a framework keeps every number in memory and in its checkpoints.

    Args:
        record: what was measured.
        model: has seen the run's records before it.
    """
    layers = aggregate_layers(record)
    named = {f"{PREFIX}/all/{name}": value for name, value in model.reduce(layers).items()}
    for layer in layers:
        named |= {f"{layer.tag}/{m}": layer.values[m] for m in LAYER_METRICS if m in layer.values}
    return named


def _with_alerts(step: int, metrics: dict[str, float], monitor: EntropyMonitor) -> dict[str, float]:
    return {**metrics, f"{PREFIX}/open_alerts": len(monitor.open_alerts), f"{PREFIX}/step": step}
