"""A run in TensorBoard: scalars and charts of layers, pictures of all heads, a table of alerts."""

from __future__ import annotations

import os
from pathlib import Path

from entropy_monitor.dashboards.head_pictures import HeadPictures
from entropy_monitor.dashboards.tensorboard_events import TensorBoardEvents, check_tensorboard
from entropy_monitor.dashboards.tensorboard_run import TensorBoardRun
from entropy_monitor.errors import ConfigurationError
from entropy_monitor.records import AlertEvent, Record, RunInfo, Sink
from entropy_monitor.trackers.layer_choice import MAX_LAYERS, LayerChoice
from entropy_monitor.trackers.named_metrics import NamedMetrics


class TensorBoardLogger(Sink):
    """Writes a run's aggregates, pictures of its heads and its alerts as TensorBoard event files.

    TensorFlow is not needed. What is written, at the training step of its record:

    - `attention/layer_03/entropy_mean`, `entropy_min`, `entropy_max`, floors, σ, largest logit,
      gradients and updates of each layer, and `attention/all/…` of the whole model; the metrics
      are those of `entropy_monitor.trackers.aggregates`. A further call of a layer in one
      forward stands under `attention/layer_03/call_1/…`. What is not known is not written. Of
      more than `max_layers` layers not all have scalars of their own; all the rest covers all.
    - `train/loss`, and `train/<name>` for scalars of your own, at their own steps.
    - `attention/open_alerts`, and the text `attention/alerts`: one table of all alerts so far,
      written anew when it has changed, once a record at most.
    - `attention/entropy_share`, `attention/max_logit`, `attention/sigma_qk`: heatmaps of layers by
      heads; grey is not known, red not finite. The first is coloured from 0 to 1, the others by
      their logarithm, over decades that are written beside it.
    - `attention/heads/entropy_share`, `…/max_logit`, `…/sigma_qk`: histograms over all heads.
    - the texts `attention/figures`, what each of these is, and `attention/layers`, which layer an
      index stands for; and the charts of the Custom Scalars tab.

    A run that is continued from a checkpoint hides what its earlier process wrote from that step
    on. Of several ranks only rank 0 writes. Once closed, a logger may be opened again for another
    run.

    Args:
        log_dir: where event files go, a folder of its own; by default `tb` in the run directory.
        heatmap_every: records between two heatmaps early in the run; they grow rarer later
            (`Cadence`). 0: none.
        histogram_every: the same for histograms.
        max_layers: attention calls with scalars and charts of their own, evenly spaced; layers with
            an alert join them, at most as many again (`LayerChoice`).
        flush_secs: how often, at most, what is pending goes to disk; a change of an alert goes
            within a second.

    Raises:
        MissingExtraError: tensorboard is not installed.
        ConfigurationError: an argument is out of range.
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str] | None = None,
        *,
        heatmap_every: int = 10,
        histogram_every: int = 10,
        max_layers: int = MAX_LAYERS,
        flush_secs: float = 10.0,
    ) -> None:
        check_tensorboard()
        if not flush_secs > 0:
            raise ConfigurationError(f"flush_secs is {flush_secs!r}; give a number of seconds above 0")
        LayerChoice(max_layers)  # what is out of range raises here
        HeadPictures(heatmap_every, histogram_every)
        self._log_dir = None if log_dir is None else os.fspath(log_dir)
        self._flush_secs = flush_secs
        self._max_layers = max_layers
        self._every = heatmap_every, histogram_every
        self._run: TensorBoardRun | None = None

    def open(self, info: RunInfo) -> None:
        """Creates the event file.

        Raises:
            ConfigurationError: there is nowhere to write, the place is a file, or the logger is
                already open.
        """
        if self._run is not None:
            raise ConfigurationError(
                f"this TensorBoardLogger is already writing to {self._run.directory}; "
                "give each monitor a logger of its own"
            )
        directory = self._directory(info)
        if info.rank != 0:
            return
        try:
            events = TensorBoardEvents(directory, self._flush_secs)
        except OSError as error:
            raise ConfigurationError(
                f"TensorBoardLogger cannot write to {directory}: {error}; give another log_dir"
            ) from error
        self._run = TensorBoardRun(
            events,
            NamedMetrics(info, self._max_layers),
            HeadPictures(*self._every),
            continued=info.session > 0,
        )

    def log(self, record: Record) -> None:
        """Writes a record's aggregates, the scalars since the last one, and at times pictures."""
        if self._run is not None:
            self._run.log(record)

    def alert(self, event: AlertEvent) -> None:
        """Notes a change, which is written with the next record, or when nothing comes for a second."""
        if self._run is not None:
            self._run.alert(event)

    def flush(self) -> None:
        """Writes the table of alerts anew if it has changed."""
        if self._run is not None:
            self._run.write_alerts()

    def close(self) -> None:
        """Writes what is pending and closes the event file; a second call does nothing."""
        run, self._run = self._run, None
        if run is not None:
            run.close()

    def _directory(self, info: RunInfo) -> str:
        if self._log_dir is None and info.run_dir is None:
            raise ConfigurationError(
                "TensorBoardLogger has nowhere to write: it was given no log_dir and the monitor "
                "keeps no run directory; use TensorBoardLogger('some/folder')"
            )
        directory = self._log_dir or str(Path(str(info.run_dir)) / "tb")
        if Path(directory).is_file():
            raise ConfigurationError(f"TensorBoardLogger's log_dir {directory} is a file; give a folder")
        return directory
