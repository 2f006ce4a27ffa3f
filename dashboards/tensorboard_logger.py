"""A run in TensorBoard: scalars and charts of layers, a heatmap of heads, a table of alerts."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from entropy_monitor.dashboards.aggregates import PREFIX, aggregate_layers, layer_tag, share_grid
from entropy_monitor.dashboards.alert_book import AlertBook, earlier_events
from entropy_monitor.dashboards.cadence import Cadence
from entropy_monitor.dashboards.heatmap import heatmap
from entropy_monitor.dashboards.markdown import alert_table, layer_table
from entropy_monitor.dashboards.tensorboard_layout import layout
from entropy_monitor.dashboards.whole_model import WholeModel
from entropy_monitor.errors import ConfigurationError, MissingExtraError
from entropy_monitor.records import AlertEvent, Record, RunInfo, Sink


@dataclass
class _Seen:
    """What the logger has seen of the run it is open for."""

    continued: bool = False
    earlier: list[AlertEvent] = field(default_factory=list)
    step: int | None = None
    calls: set[tuple[int, int]] = field(default_factory=set)
    layers: dict[int, str] = field(default_factory=dict)
    book: AlertBook = field(default_factory=AlertBook)
    model: WholeModel = field(default_factory=WholeModel)


class TensorBoardLogger(Sink):
    """Writes a run's aggregates, heatmaps and alerts as TensorBoard event files.

    TensorFlow is not needed. What is written, at the training step of its record:

    - `attention/layer_03/entropy_mean`, `entropy_min`, `entropy_max`, floors, σ, largest logit,
      gradients and updates of each layer, and `attention/all/…` of the whole model; the metrics
      are those of `entropy_monitor.dashboards.aggregates`. A further call of a layer in one
      forward stands under `attention/layer_03/call_1/…`. What is not known is not written.
    - `train/loss`, and `train/<name>` for scalars of your own, at their own steps.
    - `attention/open_alerts`, and the text `attention/alerts`: one table of all alerts so far,
      written anew at each change.
    - `attention/entropy_share`: entropy as a share of its maximum, layers by heads.
    - `attention/layers`: which layer an index stands for; and the charts of the Custom Scalars tab.

    A run that is continued from a checkpoint hides what its earlier process wrote from that step
    on. Of several ranks only rank 0 writes. Once closed, a logger may be opened again for another
    run.

    Args:
        log_dir: where event files go, a folder of its own; by default `tb` in the run directory.
        heatmap_every: records between two heatmaps early in the run; they grow rarer later
            (`Cadence`). 0: none.
        flush_secs: how often, at most, what is pending goes to disk; a change of an alert goes at
            once.

    Raises:
        MissingExtraError: tensorboard is not installed.
        ConfigurationError: `heatmap_every` or `flush_secs` is out of range.
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str] | None = None,
        *,
        heatmap_every: int = 50,
        flush_secs: float = 10.0,
    ) -> None:
        _torch_tensorboard()
        if not flush_secs > 0:
            raise ConfigurationError(f"flush_secs is {flush_secs!r}; give a number of seconds above 0")
        self._log_dir = None if log_dir is None else os.fspath(log_dir)
        self._flush_secs = flush_secs
        self._heatmaps = Cadence(heatmap_every, "heatmap_every")
        self._writer: Any = None
        self._seen = _Seen()

    def open(self, info: RunInfo) -> None:
        """Creates the event file.

        Raises:
            ConfigurationError: there is nowhere to write, the place is a file, or the logger is
                already open.
        """
        if self._writer is not None:
            raise ConfigurationError(
                f"this TensorBoardLogger is already writing to {self._writer.get_logdir()}; "
                "give each monitor a logger of its own"
            )
        directory = self._directory(info)
        if info.rank != 0:
            return
        self._seen = _Seen(continued=info.session > 0, earlier=earlier_events(info))
        self._heatmaps.restart()
        try:
            self._writer = _torch_tensorboard().FileWriter(directory, flush_secs=self._flush_secs)
        except OSError as error:
            raise ConfigurationError(
                f"TensorBoardLogger cannot write to {directory}: {error}; give another log_dir"
            ) from error

    def log(self, record: Record) -> None:
        """Writes a record's aggregates, the scalars since the last one, and at times a heatmap."""
        if self._writer is None:
            return
        if self._seen.step is None:
            self._start(record)
        else:
            self._write_open_alerts(self._seen.step)
        layers = aggregate_layers(record)
        calls = {(layer.index, layer.call) for layer in layers}
        if not calls <= self._seen.calls:
            self._seen.calls |= calls
            self._seen.layers.update({layer.index: layer.layer for layer in layers})
            self._describe(record.step)
        self._write_scalars(self._seen.model.metrics(layers), record.step)
        self._write_user_scalars(record)
        if len(record.heads["head"]) and self._heatmaps.due():
            grid = share_grid(record.heads)
            picture = heatmap(grid.share, grid.layers)
            summary = _torch_tensorboard().summary.image(
                f"{PREFIX}/entropy_share", picture, dataformats="HWC"
            )
            self._writer.add_summary(summary, record.step)
        self._seen.step = record.step

    def alert(self, event: AlertEvent) -> None:
        """Writes the table of alerts anew."""
        if self._writer is None:
            return
        self._seen.book.update(event)
        self._write_text(f"{PREFIX}/alerts", alert_table(self._seen.book.alerts), event.step)
        self._writer.flush()

    def close(self) -> None:
        """Writes what is pending and closes the event file; a second call does nothing."""
        if self._writer is None:
            return
        writer = self._writer
        try:
            if self._seen.step is not None:
                self._write_open_alerts(self._seen.step)
        finally:
            self._writer = None
            writer.close()

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

    def _start(self, record: Record) -> None:
        """Marks a process start: a second one voids what an earlier process wrote from its step on.

        The alerts that were found before that step are taken up from the run directory.
        """
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        first = min([record.step, *(int(step) for step in record.scalars["step"])])
        self._writer.add_event(Event(file_version="brain.Event:2"), first)
        # TensorBoard takes the first such mark for the run's beginning, so it has to be there too.
        self._writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), first)
        if self._seen.continued:
            self._seen.book.restore(self._seen.earlier, before=first)
            self._write_text(f"{PREFIX}/alerts", alert_table(self._seen.book.alerts), first)

    def _describe(self, step: int) -> None:
        tags = [layer_tag(index, call) for index, call in sorted(self._seen.calls)]
        charts = _torch_tensorboard().summary.custom_scalars(layout(tags))
        self._writer.add_summary(charts, step)
        self._write_text(f"{PREFIX}/layers", layer_table(self._seen.layers), step)

    def _write_scalars(self, values: dict[str, float], step: int) -> None:
        """All values in one event, which costs a fraction of an event each."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        if values:
            entries = [Summary.Value(tag=tag, simple_value=x) for tag, x in values.items()]
            self._writer.add_summary(Summary(value=entries), step)

    def _write_user_scalars(self, record: Record) -> None:
        rows = record.scalars
        by_step: dict[int, dict[str, float]] = {}
        for step, name, value in zip(rows["step"], rows["name"], rows["value"], strict=True):
            by_step.setdefault(int(step), {})[f"train/{name}"] = float(value)
        for step, values in by_step.items():
            self._write_scalars(values, step)

    def _write_open_alerts(self, step: int) -> None:
        # An alert follows the record of its step, so that a step's count is known once the next
        # record comes.
        self._write_scalars({f"{PREFIX}/open_alerts": float(self._seen.book.open)}, step)

    def _write_text(self, tag: str, text: str, step: int) -> None:
        self._writer.add_summary(_torch_tensorboard().summary.text(tag, text), step)


def _torch_tensorboard() -> Any:
    try:
        import torch.utils.tensorboard
    except ImportError as error:
        raise MissingExtraError("tensorboard", "tensorboard", "TensorBoardLogger") from error
    return torch.utils.tensorboard
