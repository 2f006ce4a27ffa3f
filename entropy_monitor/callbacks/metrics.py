"""Records as they are made, and the few numbers of them that a framework's own trackers get."""

from __future__ import annotations

import threading
import time

from torch import nn

from entropy_monitor import processes
from entropy_monitor.monitor import EntropyMonitor, StepReport
from entropy_monitor.records import AlertEvent, Record, RunInfo, Sink
from entropy_monitor.trackers.aggregates import PREFIX
from entropy_monitor.trackers.named_metrics import OPEN_ALERTS, NamedMetrics

LAYER_METRICS = ("entropy_mean", "entropy_min", "max_logit", "sigma_qk_max")
"""What trackers get of each layer; the run directory and the loggers have the rest."""

_PATIENCE = 1.0  # seconds to wait for a record that is already on its way between two threads


class MetricSink(Sink):
    """Turns records into metrics, on the monitor's thread, and keeps them until they are taken."""

    def __init__(self) -> None:
        self._arrival = threading.Condition()
        self._metrics: list[tuple[int, dict[str, float]]] = []
        self._latest = -1
        self._named = NamedMetrics()

    def open(self, info: RunInfo) -> None:  # noqa: ARG002
        """Forget an earlier run's."""
        with self._arrival:
            self._metrics, self._latest, self._named = [], -1, NamedMetrics()

    def log(self, record: Record) -> None:
        """Keep a record's metrics; one that holds only scalars has none."""
        metrics = tracker_metrics(record, self._named) if len(record.heads["head"]) else {}
        with self._arrival:
            if metrics:
                self._metrics.append((record.step, metrics))
            self._latest = max(self._latest, record.step)
            self._arrival.notify_all()

    def alert(self, event: AlertEvent) -> None:
        """Have the layer that an alert names among the metrics from the next record on."""
        self._named.alert(event)

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


def tracker_metrics(record: Record, named: NamedMetrics) -> dict[str, float]:
    """`attention/all/…` and `attention/layer_03/…` of a record, under the names of the dashboards.

    Of each layer only `LAYER_METRICS`: a framework keeps every number in memory and in its checkpoints. Of
    many layers not all (`LayerChoice`).

    Args:
        record: what was measured.
        named: has seen the run's records before it.
    """
    values = named.take(record).values
    return {
        name: value
        for name, value in values.items()
        if name.startswith(f"{PREFIX}/all/") or name.rpartition("/")[2] in LAYER_METRICS
    }


def _with_alerts(step: int, metrics: dict[str, float], monitor: EntropyMonitor) -> dict[str, float]:
    return {**metrics, OPEN_ALERTS: len(monitor.open_alerts), f"{PREFIX}/step": step}
