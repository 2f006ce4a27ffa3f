"""A record as the detectors see it: one row a head, in float64, each with its slot."""

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
    """One measured step, ready for the detectors. R rows, one a head measured in it.

    Attributes:
        record: the record itself.
        index: the numbering of heads.
        slots: the slot of each row, shape [R].
        read: whether any query row was read, shape [R]; False where all rows were masked.
        entropy: nats, shape [R].
        max_entropy: nats, shape [R].
        share: entropy / max_entropy, shape [R]; NaN where either is unknown or too few keys were
            seen.
        max_logit: largest logit, shape [R].
        loss: what is known of the loss up to this record.
    """

    record: Record
    index: HeadIndex
    slots: IntArray
    read: BoolArray
    entropy: FloatArray
    max_entropy: FloatArray
    share: FloatArray
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
        entropy = _floats(record.heads, "entropy", len(slots))
        max_entropy = _floats(record.heads, "max_entropy", len(slots))
        max_logit = _floats(record.heads, "max_logit", len(slots))
        rows = _floats(record.heads, "rows_read", len(slots))
        read = ~((rows == 0) | (max_logit == -np.inf))
        known = read & np.isfinite(entropy) & (max_entropy >= max(min_max_entropy, 1e-12))
        share = np.full(len(slots), np.nan)
        np.divide(entropy, max_entropy, out=share, where=known)
        return cls(record, index, slots, read, entropy, max_entropy, share, max_logit, loss)

    @property
    def step(self) -> int:
        """The record's training step."""
        return self.record.step

    def column(self, name: str) -> FloatArray:
        """A column of `heads` in float64, shape [R]; all NaN where the record lacks it."""
        return _floats(self.record.heads, name, len(self.slots))

    def row_of(self, slot: int) -> int | None:
        """The row of a slot, None where the head was not measured in this record."""
        rows = np.flatnonzero(self.slots == slot)
        return int(rows[0]) if len(rows) else None

    def layer_figure(self, layer: str, name: str) -> float:
        """A figure of the `layers` table, NaN where it is unknown."""
        row = self._layer_rows.get(layer)
        return math.nan if row is None else float(_floats(self.record.layers, name, row + 1)[row])

    @functools.cached_property
    def _layer_rows(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.record.layers.get("layer", ()))}


def _floats(columns: Columns, name: str, rows: int) -> FloatArray:
    if name not in columns:
        return np.full(rows, np.nan)
    return np.asarray(columns[name], dtype=np.float64)
