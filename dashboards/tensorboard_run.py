"""What `TensorBoardLogger` writes of one run, from its first record to its end."""

from __future__ import annotations

from entropy_monitor.dashboards.head_pictures import HeadPictures
from entropy_monitor.dashboards.markdown import alert_table, figure_table, layer_table
from entropy_monitor.dashboards.tensorboard_events import TensorBoardEvents
from entropy_monitor.dashboards.tensorboard_layout import GROUP, layout
from entropy_monitor.records import AlertEvent, Record
from entropy_monitor.trackers.aggregates import PREFIX, layer_tag
from entropy_monitor.trackers.named_metrics import OPEN_ALERTS, Named, NamedMetrics

Call = tuple[int, int]


class TensorBoardRun:
    """Writes records and alerts of one run.

    Args:
        events: where they go.
        metrics: names them, and keeps the alerts.
        pictures: of all heads.
        continued: whether an earlier process began the run.
    """

    def __init__(
        self, events: TensorBoardEvents, metrics: NamedMetrics, pictures: HeadPictures, *, continued: bool
    ) -> None:
        self._events = events
        self._metrics = metrics
        self._pictures = pictures
        self._continued = continued
        self._step: int | None = None  # of the last record
        self._layers: dict[int, str] = {}  # all of them, by index
        self._charted: dict[Call, str] = {}  # layers by call
        self._marked: list[Call] = []  # charts of layers with an alert
        self._alerted: int | None = None  # step of the latest change that is not in the table yet

    @property
    def directory(self) -> str:
        """Where the event file lies."""
        return self._events.directory

    def log(self, record: Record) -> None:
        """Writes a record's scalars, and at times pictures."""
        if self._step is None:
            self._start(record)
        self._write_open_alerts()
        self.write_alerts()
        named = self._metrics.take(record)
        self._describe(named, record.step)
        self._events.scalars(named.values, record.step)
        self._write_user_scalars(record)
        for tag, picture in self._pictures.heatmaps(record.heads, named.in_full):
            self._events.image(tag, picture, record.step)
        for tag, histogram in self._pictures.histograms(record.heads, named.in_full):
            self._events.histogram(tag, histogram, record.step)
        self._step = record.step

    def alert(self, event: AlertEvent) -> None:
        """Notes a change of an alert."""
        self._metrics.alert(event)
        self._alerted = event.step

    def write_alerts(self) -> None:
        """Writes the table of alerts to disk if one has changed."""
        if self._alerted is not None:
            self._events.text(f"{PREFIX}/alerts", alert_table(self._metrics.book.alerts), self._alerted)
            self._events.flush()
            self._alerted = None

    def close(self) -> None:
        """Writes what is pending and closes the event file."""
        try:
            self._write_open_alerts()
            self.write_alerts()
        finally:
            self._events.close()

    def _start(self, record: Record) -> None:
        """Marks the process start, and takes up the alerts that were found before its first step."""
        first = min([record.step, *(int(step) for step in record.scalars["step"])])
        self._events.start(first)
        if self._continued:
            self._metrics.start(first)
            self._alerted = first

    def _describe(self, named: Named, step: int) -> None:
        """Writes legends and charts where layers have come or got an alert."""
        layers = {layer.index: layer.layer for layer in named.layers}
        calls = {(layer.index, layer.call): layer.layer for layer in named.shown}
        alerted = self._metrics.choice.with_alert
        marked = [call for call in calls if calls[call] in alerted and call not in self._marked]
        marked = self._marked + marked[: GROUP - len(self._marked)]
        known = calls.keys() <= self._charted.keys() and layers.keys() <= self._layers.keys()
        if known and marked == self._marked:
            return
        if not self._layers:
            self._events.text(f"{PREFIX}/figures", figure_table(), step)
        self._layers |= layers
        self._charted |= calls
        self._marked = marked
        tags = [layer_tag(*call) for call in sorted(self._charted)]
        self._events.charts(layout(tags, [layer_tag(*call) for call in sorted(marked)]), step)
        legend = layer_table(self._layers, {index for index, _ in self._charted})
        self._events.text(f"{PREFIX}/layers", legend, step)

    def _write_user_scalars(self, record: Record) -> None:
        rows = record.scalars
        by_step: dict[int, dict[str, float]] = {}
        for step, name, value in zip(rows["step"], rows["name"], rows["value"], strict=True):
            by_step.setdefault(int(step), {})[f"train/{name}"] = float(value)
        for step, values in by_step.items():
            self._events.scalars(values, step)

    def _write_open_alerts(self) -> None:
        # An alert follows the record of its step, so that a step's count is known once the next
        # record comes.
        if self._step is not None:
            self._events.scalars({OPEN_ALERTS: float(self._metrics.book.open)}, self._step)
