"""A record as the detectors see it: a place for every head ever met, in float64."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from entropy_monitor.analyzer.loss import LossTrack
from entropy_monitor.analyzer.slots import BoolArray, FloatArray, HeadIndex, IntArray
from entropy_monitor.records import Columns, Record


@dataclass(frozen=True)
class Reading:
    """One measured step, ready for the detectors, in the order of slots: S of them, some not measured in it.

    Attributes:
        record: the record itself.
        index: the numbering of heads.
        slots: the slot of each row of the record, shape [R].
        seen: whether the record has a row of the slot, shape [S].
        read: whether any query row was read, shape [S]; False where all rows were masked, or none seen.
        entropy: nats, shape [S]; here and below NaN where not seen.
        max_entropy: nats, shape [S].
        share: entropy / max_entropy, shape [S]; NaN where either is unknown or too few keys were
            seen.
        judged: whether the share is known, shape [S].
        max_logit: largest logit, shape [S].
        loss: what is known of the loss up to this record.
    """

    record: Record
    index: HeadIndex
    slots: IntArray
    seen: BoolArray
    read: BoolArray
    entropy: FloatArray
    max_entropy: FloatArray
    share: FloatArray
    judged: BoolArray
    max_logit: FloatArray
    loss: LossTrack

    @classmethod
    def of(cls, record: Record, index: HeadIndex, loss: LossTrack, min_max_entropy: float) -> Reading:
        """Align a record with the numbering of heads.

        Args:
            record: what was measured.
            index: the numbering, extended by heads met for the first time.
            loss: the loss so far, this record's included.
            min_max_entropy: nats; heads whose maximum is lower get share NaN.
        """
        slots = index.place(record.heads)
        seen = np.zeros(len(index), dtype=np.bool_)
        seen[slots] = True
        entropy, max_entropy, max_logit, rows = (
            _in_slots(record.heads, name, index, slots)
            for name in ("entropy", "max_entropy", "max_logit", "rows_read")
        )
        read = seen & (rows != 0) & (max_logit != -np.inf)
        judged = read & np.isfinite(entropy) & (max_entropy >= max(min_max_entropy, 1e-12))
        share = np.full(len(index), np.nan)
        np.divide(entropy, max_entropy, out=share, where=judged)
        return cls(record, index, slots, seen, read, entropy, max_entropy, share, judged, max_logit, loss)

    @property
    def step(self) -> int:
        """The record's training step."""
        return self.record.step

    def column(self, name: str) -> FloatArray:
        """A column of `heads`, shape [S], not to be written to; NaN where the record lacks it."""
        return _in_slots(self.record.heads, name, self.index, self.slots)

    def layer_figure(self, layer: str, name: str) -> float:
        """A figure of the `layers` table, NaN where it is unknown."""
        row = self._layer_rows.get(layer)
        return math.nan if row is None else float(_floats(self.record.layers, name, row + 1)[row])

    def layer_figures(self, name: str) -> FloatArray:
        """A figure of all rows of the `layers` table, shape [rows], NaN where it is unknown."""
        return _floats(self.record.layers, name, len(self.record.layers.get("layer", ())))

    @functools.cached_property
    def _layer_rows(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.record.layers.get("layer", ()))}


def _in_slots(heads: Columns, name: str, index: HeadIndex, slots: IntArray) -> FloatArray:
    values = _floats(heads, name, len(slots))
    if index.in_order:
        return values
    placed = np.full(len(index), np.nan)
    placed[slots] = values
    return placed


def _floats(columns: Columns, name: str, rows: int) -> FloatArray:
    if name not in columns:
        return np.full(rows, np.nan)
    return np.asarray(columns[name], dtype=np.float64)
