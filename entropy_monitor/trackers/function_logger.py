"""A plain callable as a sink: any tracker in three lines."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TypeAlias

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.records import AlertEvent, Record, RunInfo, Sink
from entropy_monitor.trackers.layer_choice import MAX_LAYERS, LayerChoice
from entropy_monitor.trackers.named_metrics import OPEN_ALERTS, NamedMetrics, last_scalars

MetricFunction: TypeAlias = Callable[[dict[str, float], int], object]
"""What takes a measured step's metrics, by name, and the step."""


class FunctionLogger(Sink):
    """Hands the metrics of every measured step to a function: MLflow, Aim, Neptune, ClearML, a file.

    A callable among the monitor's `loggers` becomes one by itself; make one to say `max_layers`. The
    function gets `attention/all/…` of the whole model, `attention/layer_03/entropy_mean` and its like (see
    `entropy_monitor.trackers.aggregates`), `attention/open_alerts` as of before the step, and
    `attention/train/loss` and your own scalars, of each the last since the record before. What is not known
    is not there; what was measured and is not finite is. A new dict each time: it may be changed or kept.

    It is called on a thread of its own, never on training's, one call after another; if it raises it is
    switched off, and the log says so. A tracker that finds its run by thread must be told the run (MLflow:
    `run_id=`). Of several ranks only rank 0 calls it. Alerts themselves go to `EntropyMonitor(on_alert=…)`.

    Args:
        function: takes metrics and step.
        max_layers: attention calls with metrics of their own, evenly spaced; layers with an alert join them,
            at most as many again (`LayerChoice`).

    Raises:
        ConfigurationError: this is no function that takes metrics and step, or `max_layers` is out of range.

    Example:
        >>> with mlflow.start_run() as run:
        ...     log = lambda metrics, step: mlflow.log_metrics(metrics, step, run_id=run.info.run_id)
        ...     monitor = EntropyMonitor(model, loggers=[log])
    """

    def __init__(self, function: MetricFunction, *, max_layers: int = MAX_LAYERS) -> None:
        check_function(function)
        LayerChoice(max_layers)  # raises where it is out of range
        self._function = function
        self._max_layers = max_layers
        self._metrics: NamedMetrics | None = None
        self._started = False

    def open(self, info: RunInfo) -> None:
        """Begins a run; on other ranks than the first nothing follows."""
        self._metrics = NamedMetrics(info, self._max_layers) if info.rank == 0 else None
        self._started = False

    def log(self, record: Record) -> None:
        """Calls the function; not for what comes between measured steps, which is scalars alone."""
        if self._metrics is None or not len(record.heads["head"]):
            return
        if not self._started:
            self._metrics.start(record.step)
            self._started = True
        values = self._metrics.take(record).values | last_scalars(record)
        self._function(values | {OPEN_ALERTS: float(self._metrics.book.open)}, record.step)

    def alert(self, event: AlertEvent) -> None:
        """Counts alerts."""
        if self._metrics is not None:
            self._metrics.alert(event)

    def close(self) -> None:
        """Ends the run; a second call does nothing."""
        self._metrics = None


def check_function(function: object) -> None:
    """Raises unless this can be called with metrics and step.

    Raises:
        ConfigurationError: it is no callable, takes other arguments, or would only make a coroutine.
    """
    what = getattr(function, "__qualname__", None) or repr(function)
    if not callable(function) or isinstance(function, type):
        raise ConfigurationError(f"{what} cannot be a logger; {_WANTED}")
    if inspect.iscoroutinefunction(function):
        raise ConfigurationError(
            f"{what} is a coroutine function, which nothing would await; give a plain function"
        )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # of code that is not Python's: the first call will tell
    try:
        signature.bind({}, 0)
    except TypeError as error:
        raise ConfigurationError(f"{what} cannot be a logger: {error}; {_WANTED}") from None


_WANTED = "a function that is one takes two arguments, metrics (a dict from name to number) and step"
