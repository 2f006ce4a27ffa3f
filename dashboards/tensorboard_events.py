"""One TensorBoard event file: scalars, pictures, texts and charts as the events that TensorBoard reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from entropy_monitor.dashboards.head_pictures import Histogram
from entropy_monitor.dashboards.heatmap import Image
from entropy_monitor.dashboards.tensorboard_layout import Layout
from entropy_monitor.errors import MissingExtraError


def check_tensorboard() -> None:
    """Raises unless event files can be written.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """
    _torch_tensorboard()


class TensorBoardEvents:
    """Writes events; nothing here calls torch's operators, so that it may run on any thread.

    Args:
        directory: a folder; made if need be.
        flush_secs: how often, at most, what is pending goes to disk.

    Attributes:
        directory: as given.

    Raises:
        MissingExtraError: tensorboard is not installed.
        OSError: the folder cannot be written to.
    """

    def __init__(self, directory: str, flush_secs: float) -> None:
        self._tensorboard = _torch_tensorboard()
        self._writer = self._tensorboard.FileWriter(directory, flush_secs=flush_secs)
        self.directory = directory

    def start(self, step: int) -> None:
        """Marks a process start: a second one voids what an earlier process wrote from its step on."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self._writer.add_event(Event(file_version="brain.Event:2"), step)
        # TensorBoard takes the first such mark for the run's beginning, so it has to be there too.
        self._writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """All values in one event, which costs a fraction of an event each."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        if not values:
            return
        entries = [Summary.Value(tag=tag, simple_value=x) for tag, x in values.items()]
        self._writer.add_summary(Summary(value=entries), step)

    def image(self, tag: str, picture: Image, step: int) -> None:
        """A picture, `[height, width, 3]`."""
        self._writer.add_summary(self._tensorboard.summary.image(tag, picture, dataformats="HWC"), step)

    def histogram(self, tag: str, histogram: Histogram, step: int) -> None:
        """A histogram."""
        filled = histogram.counts.nonzero()[0]
        first, last = int(filled[0]), int(filled[-1])
        summary = self._tensorboard.summary.histogram_raw(
            tag,
            min=float(histogram.edges[first]),
            max=float(histogram.edges[last + 1]),
            num=int(histogram.counts.sum()),
            sum=histogram.total,
            sum_squares=histogram.squares,
            bucket_limits=histogram.edges[first + 1 : last + 2].tolist(),
            bucket_counts=histogram.counts[first : last + 1].tolist(),
        )
        self._writer.add_summary(summary, step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """A text in markdown."""
        self._writer.add_summary(self._tensorboard.summary.text(tag, markdown), step)

    def charts(self, layout: Layout, step: int) -> None:
        """The charts of the Custom Scalars tab; the latest ones count."""
        self._writer.add_summary(self._tensorboard.summary.custom_scalars(layout), step)

    def flush(self) -> None:
        """Brings what is pending to disk."""
        self._writer.flush()

    def close(self) -> None:
        """Writes what is pending and closes the file."""
        self._writer.close()


def _torch_tensorboard() -> Any:
    try:
        import torch.utils.tensorboard
    except ImportError as error:
        raise MissingExtraError("tensorboard", "tensorboard", "TensorBoardLogger") from error
    return torch.utils.tensorboard
