"""A run in Weights & Biases: aggregates as metrics, heads as tables, alerts as alerts."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from entropy_monitor.dashboards.aggregates import PREFIX, aggregate_layers, share_grid
from entropy_monitor.dashboards.alert_book import AlertBook, earlier_events
from entropy_monitor.dashboards.cadence import Cadence
from entropy_monitor.dashboards.heatmap import heatmap
from entropy_monitor.dashboards.wandb_start import check_arguments, import_wandb, start_run
from entropy_monitor.dashboards.wandb_tables import alert_rows, head_rows
from entropy_monitor.dashboards.whole_model import WholeModel
from entropy_monitor.errors import ConfigurationError
from entropy_monitor.records import Alert, AlertEvent, Record, RunInfo, Severity, Sink

STEP = f"{PREFIX}/step"
LEVELS: dict[Severity, str] = {"info": "INFO", "warning": "WARN", "severe": "ERROR"}
TITLE_LENGTH = 63
"""W&B refuses longer titles of alerts."""

# W&B holds back alerts of one title for this long, a minute by default. Each of ours is sent once,
# and again only when its severity rises: none is to be held back.
_ALERT_WAIT = timedelta(seconds=1)
_SUMMARIES = {"entropy_min": "min,last", "max_logit": "max,last", "sigma_qk_max": "max,last"}


@dataclass
class _Seen:
    """What the logger has seen of the run it is open for.

    Attributes:
        step: of the last record.
        names: of the metrics logged so far.
        untabled: the last record, unless a table was made of it.
        book: the alerts so far.
        model: which layers' norms were known so far.
        earlier: what earlier processes of the run found, until the first record says what counts.
    """

    step: int | None = None
    names: set[str] = field(default_factory=set)
    untabled: Record | None = None
    earlier: list[AlertEvent] = field(default_factory=list)
    book: AlertBook = field(default_factory=AlertBook)
    model: WholeModel = field(default_factory=WholeModel)


class WandbLogger(Sink):
    """Writes a run's aggregates, head tables, heatmaps and alerts to Weights & Biases.

    It logs into the run it is given, else into the one that `wandb.init` made before the monitor
    was opened, else into one of its own, which it finishes. A run of its own is online where W&B
    finds an account, and otherwise recorded offline, without asking; `wandb sync` uploads it
    later.

    What is logged, in one `log` call a record, over the axis `attention/step` (the training step)
    and never with `step=`, so that your own steps stay yours:

    - `attention/layer_03/entropy_mean` and the other metrics of
      `entropy_monitor.dashboards.aggregates`, a further call of a layer under
      `attention/layer_03/call_1/…`, the whole model under `attention/all/…`; what is not known is
      not logged. The run's summary keeps the least `entropy_min` and the largest `max_logit`,
      `sigma_qk_max`.
    - `attention/train/loss`, and your own scalars: of each the last since the record before.
    - `attention/open_alerts`: alerts open when the record was taken; in the summary, always the
      latest count.
    - `attention/heads`, a table of all heads, and `attention/entropy_share`, a heatmap of layers
      by heads.
    - `attention/alerts`: a table of all alerts, at the end. Each alert is also sent through
      `run.alert`, and once more when its severity rises.

    Of several ranks only rank 0 logs. Once closed, a logger may be opened again for another run.

    Args:
        run: a W&B run that is under way.
        project: where a run of its own goes.
        name: its name; by default that of the run directory.
        mode: `online`, `offline`, `disabled` or `shared`; by default as said above, or as
            `WANDB_MODE` says.
        dir: folder for W&B's files; made if need be.
        heads_table_every: records between two head tables early in the run; they grow rarer later
            (`Cadence`). 0: none.
        heatmap_every: the same for heatmaps.
        **init_kwargs: passed on to `wandb.init`, such as `entity`, `group`, or `id` and `resume`
            to continue a run.

    Raises:
        MissingExtraError: wandb is not installed, or pillow, which its images need.
        ConfigurationError: an argument is out of range, or means nothing beside `run`.
    """

    def __init__(
        self,
        run: Any = None,
        *,
        project: str = "entropy-monitor",
        name: str | None = None,
        mode: str | None = None,
        dir: str | os.PathLike[str] | None = None,  # noqa: A002  W&B's own name for it
        heads_table_every: int = 200,
        heatmap_every: int = 50,
        **init_kwargs: Any,
    ) -> None:
        self._wandb = import_wandb(images=heatmap_every != 0)
        check_arguments(run, {"name": name, "mode": mode, "dir": dir, **init_kwargs})
        self._given = run
        self._init = {"project": project, "name": name, "mode": mode, "dir": dir, **init_kwargs}
        self._tables = Cadence(heads_table_every, "heads_table_every")
        self._draws_tables = heads_table_every > 0
        self._heatmaps = Cadence(heatmap_every, "heatmap_every")
        self._run: Any = None
        self._owned = False
        self._seen = _Seen()

    def open(self, info: RunInfo) -> None:
        """Finds or starts the W&B run, and tells it what is coming.

        Raises:
            ConfigurationError: the logger is already open, `dir` cannot be used, or
                `mode="online"` without account.
        """
        if self._run is not None:
            raise ConfigurationError(
                "this WandbLogger is already open; give each monitor a logger of its own"
            )
        if info.rank != 0:
            return
        self._seen = _Seen(earlier=earlier_events(info))
        self._tables.restart()
        self._heatmaps.restart()
        present = self._given if self._given is not None else self._wandb.run
        self._owned = present is None
        self._run = start_run(self._wandb, self._init, info) if present is None else present
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric(f"{PREFIX}/*", step_metric=STEP)
        about = {
            "options": info.options,
            "versions": info.versions,
            "run_dir": info.run_dir,
            "session": info.session,
        }
        plain = json.loads(json.dumps(about, default=str))
        self._run.config.update({"entropy_monitor": plain}, allow_val_change=True)

    def log(self, record: Record) -> None:
        """Logs a record in one call."""
        if self._run is None:
            return
        if self._seen.step is None:
            self._seen.book.restore(self._seen.earlier, before=record.step)
        row: dict[str, Any] = dict(self._seen.model.metrics(aggregate_layers(record)))
        self._define(row)
        for name, value in zip(record.scalars["name"], record.scalars["value"], strict=True):
            row[f"{PREFIX}/train/{name}"] = float(value)
        row[f"{PREFIX}/open_alerts"] = self._seen.book.open
        self._seen.untabled = None
        if len(record.heads["head"]):
            if self._heatmaps.due():
                grid = share_grid(record.heads)
                picture = heatmap(grid.share, grid.layers)
                row[f"{PREFIX}/entropy_share"] = self._wandb.Image(picture)
            if self._tables.due():
                row[f"{PREFIX}/heads"] = self._wandb.Table(*head_rows(record.heads))
            elif self._draws_tables:
                self._seen.untabled = record
        self._run.log({STEP: record.step, **row})
        self._seen.step = record.step

    def alert(self, event: AlertEvent) -> None:
        """Sends an alert that is new or got worse, and keeps the summary's count of open ones."""
        if self._run is None:
            return
        if self._seen.book.update(event):
            alert = event.alert
            self._run.alert(
                title=alert_title(alert),
                text=f"{alert.message}\n\nWhat to do: {alert.advice}",
                level=LEVELS[alert.severity],
                wait_duration=_ALERT_WAIT,
            )
        self._run.summary[f"{PREFIX}/open_alerts"] = self._seen.book.open

    def close(self) -> None:
        """Logs the last record's heads and the table of alerts, and finishes a run of its own.

        A second call does nothing; nor is anything lost where you have finished the run before.
        """
        if self._run is None:
            return
        run, self._run = self._run, None
        try:
            # A run that its owner has finished takes no more; what was logged before stands.
            with contextlib.suppress(self._wandb.errors.UsageError):
                self._log_rest(run)
        finally:
            if self._owned:
                run.finish()

    def _define(self, names: dict[str, Any]) -> None:
        """Asks W&B to keep extremes of some metrics in the summary, once for each."""
        for name in names.keys() - self._seen.names:
            self._seen.names.add(name)
            summary = _SUMMARIES.get(name.rpartition("/")[2])
            if summary is not None:
                self._run.define_metric(name, step_metric=STEP, summary=summary)

    def _log_rest(self, run: Any) -> None:
        rest: dict[str, Any] = {}
        if self._seen.untabled is not None:
            rest[f"{PREFIX}/heads"] = self._wandb.Table(*head_rows(self._seen.untabled.heads))
        if self._seen.book.alerts:
            rest[f"{PREFIX}/alerts"] = self._wandb.Table(*alert_rows(self._seen.book.alerts))
        if rest and self._seen.step is not None:
            rest[f"{PREFIX}/open_alerts"] = self._seen.book.open
            run.log({STEP: self._seen.step, **rest})


def alert_title(alert: Alert) -> str:
    """Severity and title, shortened in the middle to what W&B takes; its ends say what, where."""
    title = f"[{alert.severity}] {' '.join(alert.title.split())}"
    if len(title) <= TITLE_LENGTH:
        return title
    half = (TITLE_LENGTH - 1) // 2
    return f"{title[:half]}…{title[-half:]}"
