"""What `WandbLogger` logs of one run, from its first record to its end."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from entropy_monitor.dashboards.cadence import Cadence
from entropy_monitor.dashboards.head_pictures import HeadPictures
from entropy_monitor.dashboards.last_state import LastState
from entropy_monitor.dashboards.run_summary import RunSummary
from entropy_monitor.dashboards.wandb_alerts import AlertMail, Message
from entropy_monitor.dashboards.wandb_tables import alert_rows, head_rows, layer_rows
from entropy_monitor.records import AlertEvent, Record
from entropy_monitor.trackers.aggregates import PREFIX
from entropy_monitor.trackers.named_metrics import OPEN_ALERTS, NamedMetrics, last_scalars

STEP = f"{PREFIX}/step"

_SUMMARIES = {"entropy_min": "min,last", "max_logit": "max,last", "sigma_qk_max": "max,last"}
_NOT_HELD_BACK = timedelta(seconds=1)
"""W&B holds back alerts of one title, by 0 for a minute; ours are apart already as the user wants them."""

_CHARTED = ("entropy_mean", "entropy_min", "max_logit", "sigma_qk_max", "grad_linf")


class WandbRun:
    """Logs records and alerts of one run into one W&B run.

    Args:
        wandb: the module.
        run: W&B's run.
        metrics: names the metrics, and keeps the alerts.
        pictures: of all heads.
        tables: when the tables of heads and layers are logged.
        tabled: whether they are at all.
        mail: says when to send alerts.
        continued: whether an earlier process began the run, and may have left a summary.
    """

    def __init__(
        self,
        wandb: Any,
        run: Any,
        metrics: NamedMetrics,
        pictures: HeadPictures,
        tables: Cadence,
        *,
        tabled: bool,
        mail: AlertMail,
        continued: bool,
    ) -> None:
        self._wandb = wandb
        self._run = run
        self._metrics = metrics
        self._pictures = pictures
        self._tables = tables
        self._tabled = tabled
        self._mail = mail
        self._state = LastState()
        self._untabled = False  # whether the state has changed since it was tabled
        self._summary = RunSummary(self._earlier() if continued else None)
        self._summed: dict[str, Any] = {}
        self._step: int | None = None
        self._defined: set[str] = set()
        self._alerts_are_new = False

    def log(self, record: Record) -> None:
        """Logs a record in one call, and what there is to tell of alerts before it."""
        if self._step is None:
            self._metrics.start(record.step)
        self._send(self._mail.due())
        named = self._metrics.take(record)
        self._state.take(record.heads, named.layers)
        self._summary.take(record)
        self._define(named.values)
        row: dict[str, Any] = {**named.values, **last_scalars(record), OPEN_ALERTS: self._open_alerts}
        for tag, picture in self._pictures.heatmaps(record.heads, named.in_full):
            row[tag] = self._wandb.Image(picture)
        for tag, counted in self._pictures.histograms(record.heads, named.in_full):
            row[tag] = self._wandb.Histogram(np_histogram=(counted.counts, counted.edges))
        if len(record.heads["head"]):
            self._untabled = self._tabled
            if self._tables.due():
                row |= self._state_tables()
        if self._alerts_are_new:
            row |= self._alert_table()
        self._run.log({STEP: record.step, **row})
        self._step = record.step
        self._sum_up()

    def alert(self, event: AlertEvent) -> None:
        """Notes an alert that is new or got worse, to be told."""
        if self._metrics.alert(event):
            self._mail.add(event.alert)

    def tell(self) -> None:
        """Sends what waits, unless too little time has passed since the last message; sums the run up."""
        self._send(self._mail.due())
        self._sum_up()

    def finish(self) -> None:
        """Tells what still waits, and logs the last state of heads and layers and the table of alerts."""
        self._send(self._mail.rest())
        rest: dict[str, Any] = self._state_tables() if self._untabled else {}
        if self._metrics.book.alerts:
            rest |= self._alert_table()
        if rest and self._step is not None:
            rest[OPEN_ALERTS] = self._open_alerts
            self._run.log({STEP: self._step, **rest})
        self._sum_up()

    @property
    def _open_alerts(self) -> int:
        return self._metrics.book.open

    def _send(self, message: Message | None) -> None:
        if message is None:
            return
        self._run.alert(
            title=message.title, text=message.text, level=message.level, wait_duration=_NOT_HELD_BACK
        )
        self._alerts_are_new = True

    def _state_tables(self) -> dict[str, Any]:
        self._untabled = False
        return {
            f"{PREFIX}/heads": self._wandb.Table(*head_rows(self._state.heads)),
            f"{PREFIX}/layers": self._wandb.Table(*layer_rows(self._state.layers)),
        }

    def _alert_table(self) -> dict[str, Any]:
        self._alerts_are_new = False
        return {f"{PREFIX}/alerts": self._wandb.Table(*alert_rows(self._metrics.book.alerts))}

    def _sum_up(self) -> None:
        """Puts what has changed into the run's summary."""
        named = {f"{PREFIX}/{k}": v for k, v in self._summary.values(self._metrics.book.alerts).items()}
        changed = {k: v for k, v in named.items() if self._summed.get(k) != v}
        if changed:
            self._run.summary.update(changed)
            self._summed |= changed

    def _earlier(self) -> dict[str, Any]:
        """The summary that a continued W&B run has already."""
        present = {name.removeprefix(f"{PREFIX}/"): name for name in self._run.summary.keys()}  # noqa: SIM118  no mapping
        return {short: self._run.summary[name] for short, name in present.items() if short != name}

    def _define(self, names: dict[str, float]) -> None:
        """Tells W&B, once for each metric, which extremes to keep and which to draw without being asked."""
        for name in names.keys() - self._defined:
            self._defined.add(name)
            metric = name.rpartition("/")[2]
            summary = _SUMMARIES.get(metric)
            if summary is not None or metric not in _CHARTED:
                hidden = metric not in _CHARTED or None
                self._run.define_metric(name, step_metric=STEP, summary=summary, hidden=hidden)
