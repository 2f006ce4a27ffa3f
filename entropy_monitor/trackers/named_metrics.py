"""From the records and alerts of a run, in turn, to the named numbers that a tracker takes."""

from __future__ import annotations

from dataclasses import dataclass

from entropy_monitor.records import AlertEvent, Record, RunInfo
from entropy_monitor.trackers.aggregates import PREFIX, LayerAggregate, aggregate_layers
from entropy_monitor.trackers.alert_book import AlertBook, earlier_events
from entropy_monitor.trackers.layer_choice import MAX_LAYERS, LayerChoice
from entropy_monitor.trackers.whole_model import WholeModel

OPEN_ALERTS = f"{PREFIX}/open_alerts"
ALL_SIGMA = f"{PREFIX}/all/sigma_qk_max"


@dataclass(frozen=True)
class Named:
    """What a record comes to.

    Attributes:
        values: metric to value, `attention/all/…` of the whole model and `attention/layer_03/…` of the layers
            that are shown.
        layers: every call of the record.
        shown: the calls among `values`.
    """

    values: dict[str, float]
    layers: list[LayerAggregate]
    shown: list[LayerAggregate]

    @property
    def in_full(self) -> bool:
        """Whether σ_QK is known of every head that it can be known of."""
        return ALL_SIGMA in self.values


class NamedMetrics:
    """Names the metrics of one run, remembers its alerts, and chooses the layers that are shown.

    Args:
        info: of the run; where it is continued, alerts from before the step that it is continued at are
            taken up from its directory.
        max_layers: calls with metrics of their own; see `LayerChoice`.

    Attributes:
        book: the alerts so far.
        choice: the layers shown.
    """

    def __init__(self, info: RunInfo | None = None, max_layers: int = MAX_LAYERS) -> None:
        self.book = AlertBook()
        self.choice = LayerChoice(max_layers)
        self._model = WholeModel()
        self._earlier = [] if info is None else earlier_events(info)

    def start(self, step: int) -> None:
        """Takes up the alerts from before `step`; those of a process that went further are void."""
        self.book.restore(self._earlier, before=step)
        for alert in self.book.alerts:
            self.choice.alert(alert.layer)
        self._earlier = []

    def take(self, record: Record) -> Named:
        """Takes a record in and names its metrics."""
        layers = aggregate_layers(record)
        shown = self.choice.choose(layers)
        return Named(self._model.metrics(layers, shown), layers, shown)

    def alert(self, event: AlertEvent) -> bool:
        """Takes an alert's change in; True if a person should be told: it is new, or its severity rose."""
        self.choice.alert(event.alert.layer)
        return self.book.update(event)


def last_scalars(record: Record) -> dict[str, float]:
    """`attention/train/loss` and the scalars of the user's, of each the last since the record before."""
    rows = record.scalars
    return {
        f"{PREFIX}/train/{name}": float(value)
        for name, value in zip(rows["name"], rows["value"], strict=True)
    }
