"""A run in Weights & Biases: aggregates as metrics, heads as pictures and tables, alerts as alerts."""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

from entropy_monitor.dashboards.cadence import Cadence
from entropy_monitor.dashboards.head_pictures import HeadPictures
from entropy_monitor.dashboards.wandb_alerts import AlertMail
from entropy_monitor.dashboards.wandb_run import STEP, WandbRun
from entropy_monitor.dashboards.wandb_start import check_arguments, import_wandb, start_run
from entropy_monitor.errors import ConfigurationError
from entropy_monitor.records import AlertEvent, Record, RunInfo, Sink
from entropy_monitor.trackers.aggregates import PREFIX
from entropy_monitor.trackers.layer_choice import MAX_LAYERS, LayerChoice
from entropy_monitor.trackers.named_metrics import NamedMetrics


class WandbLogger(Sink):
    """Writes a run's aggregates, pictures and tables of its heads, and its alerts to Weights & Biases.

    It logs into the run it is given, else into the one that `wandb.init` made before the monitor
    was opened, else into one of its own, which it finishes. A run of its own is online where W&B
    finds an account, and otherwise recorded offline, without asking; `wandb sync` uploads it
    later.

    What is logged, in one `log` call a record, over the axis `attention/step` (the training step)
    and never with `step=`, so that your own steps stay yours:

    - `attention/layer_03/entropy_mean` and the other metrics of
      `entropy_monitor.trackers.aggregates`, a further call of a layer under
      `attention/layer_03/call_1/…`, the whole model under `attention/all/…`; what is not known is
      not logged. W&B draws mean and least entropy, largest logit, σ_QK and largest gradient by
      itself; the others are there for charts of your own. Of more than `max_layers` layers not all
      have metrics of their own; all the rest covers all.
    - `attention/train/loss`, and your own scalars: of each the last since the record before.
    - `attention/open_alerts`: alerts open when the record was taken.
    - `attention/entropy_share`, `attention/max_logit`, `attention/sigma_qk`: heatmaps of layers by
      heads, as `TensorBoardLogger` draws them; `attention/heads/entropy_share`, `…/max_logit`,
      `…/sigma_qk`: histograms over all heads.
    - `attention/heads` and `attention/layers`: tables of the last state of every head and layer,
      norms as they were last read; the second also says which layer an index stands for.
    - `attention/alerts`: a table of all alerts, after each message and at the end.

    The run's summary has `attention/verdict` (`sound`, `watch` after a warning, `trouble` after a
    severe alert or a loss that was not finite), `alerts_severe`, `alerts_warning`, `alerts_info`,
    `open_alerts`, `first_alert` and its step, `lowest_share`, `largest_logit` and `sigma_growth` of
    any head with the place where each was read, `end_share` and `last_step`; and of each metric
    the least `entropy_min` and the largest `max_logit` and `sigma_qk_max`.

    Alerts are sent through `run.alert`, when they are new and once more when their severity rises:
    those that come together in one message, and messages at least `alert_wait` seconds apart.

    Of several ranks only rank 0 logs. Once closed, a logger may be opened again for another run.

    Args:
        run: a W&B run that is under way.
        project: where a run of its own goes.
        name: its name; by default that of the run directory.
        mode: `online`, `offline`, `disabled` or `shared`; by default as said above, or as
            `WANDB_MODE` says.
        dir: folder for W&B's files; made if need be.
        heads_table_every: records between two tables of heads and layers early in the run; they
            grow rarer later (`Cadence`). 0: none.
        heatmap_every: the same for heatmaps.
        histogram_every: the same for histograms.
        max_layers: attention calls with metrics of their own, evenly spaced; layers with an alert
            join them, at most as many again (`LayerChoice`).
        alert_wait: seconds between two messages about alerts.
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
        heatmap_every: int = 10,
        histogram_every: int = 10,
        max_layers: int = MAX_LAYERS,
        alert_wait: float = 60.0,
        **init_kwargs: Any,
    ) -> None:
        self._wandb = import_wandb(images=heatmap_every != 0)
        check_arguments(run, {"name": name, "mode": mode, "dir": dir, **init_kwargs})
        LayerChoice(max_layers)  # what is out of range raises here
        HeadPictures(heatmap_every, histogram_every)
        Cadence(heads_table_every, "heads_table_every")
        AlertMail(alert_wait)
        self._given = run
        self._init = {"project": project, "name": name, "mode": mode, "dir": dir, **init_kwargs}
        self._every = heatmap_every, histogram_every
        self._tables_every = heads_table_every
        self._max_layers = max_layers
        self._alert_wait = alert_wait
        self._wandb_run: Any = None
        self._owned = False
        self._run: WandbRun | None = None

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
        present = self._given if self._given is not None else self._wandb.run
        self._owned = present is None
        self._wandb_run = start_run(self._wandb, self._init, info) if present is None else present
        self._wandb_run.define_metric(STEP, hidden=True)
        self._wandb_run.define_metric(f"{PREFIX}/*", step_metric=STEP)
        about = {
            "options": info.options,
            "versions": info.versions,
            "run_dir": info.run_dir,
            "session": info.session,
        }
        plain = json.loads(json.dumps(about, default=str))
        self._wandb_run.config.update({"entropy_monitor": plain}, allow_val_change=True)
        self._run = WandbRun(
            self._wandb,
            self._wandb_run,
            NamedMetrics(info, self._max_layers),
            HeadPictures(*self._every),
            Cadence(self._tables_every, "heads_table_every"),
            tabled=self._tables_every > 0,
            mail=AlertMail(self._alert_wait),
            continued=info.session > 0,
        )

    def log(self, record: Record) -> None:
        """Logs a record in one call."""
        if self._run is not None:
            self._run.log(record)

    def alert(self, event: AlertEvent) -> None:
        """Notes an alert's change; it is told with the next record, or when nothing comes for a second."""
        if self._run is not None:
            self._run.alert(event)

    def flush(self) -> None:
        """Tells of alerts that wait, unless too little time has passed since the last message."""
        if self._run is not None:
            self._run.tell()

    def close(self) -> None:
        """Logs the last state and the table of alerts, and finishes a run of its own.

        A second call does nothing; nor is anything lost where you have finished the run before.
        """
        if self._run is None:
            return
        run, self._run = self._run, None
        wandb_run, self._wandb_run = self._wandb_run, None
        try:
            # A run that its owner has finished takes no more; what was logged before stands.
            with contextlib.suppress(self._wandb.errors.UsageError):
                run.finish()
        finally:
            if self._owned:
                wandb_run.finish()
