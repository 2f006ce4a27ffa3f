"""From a record's rows to the few numbers a layer that a tracker draws, and their names.

A layer's heads are reduced in float64. What is not known (null) is left out, never drawn as 0: a
metric that no head knows has no value at all. A reading that is not finite is kept, and shows in
every mean, least and largest value that it enters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from entropy_monitor.records import HEADS, LAYERS, Columns, Record

Reduction = Literal["mean", "min", "max"]
FloatArray = npt.NDArray[np.float64]

PREFIX = "attention"

HEAD_METRICS: dict[str, tuple[str, Reduction]] = {
    "entropy_mean": ("entropy", "mean"),
    "entropy_min": ("entropy", "min"),
    "entropy_max": ("entropy", "max"),
    "max_entropy": ("max_entropy", "mean"),
    "floor_row": ("floor_row", "min"),
    "floor_activation": ("floor_activation", "min"),
    "floor_weights": ("floor_weights", "min"),
    "floor_paper": ("floor_paper", "min"),
    "sigma_qk_max": ("sigma_qk", "max"),
    "max_logit": ("max_logit", "max"),
}
"""Metric of a layer's call: the column of `heads` it comes from, and how heads are reduced to it.

Floors take the least over heads: no head of the layer can have less entropy than that.
"""

_NULLABLE = {column.name: column.nullable for column in HEADS.columns}

LAYER_METRICS: tuple[str, ...] = tuple(c.name for c in LAYERS.columns if c.nullable)
"""Metrics of a layer that `layers` holds: norms of its weights, gradients and updates."""

_OVER_HEADS: dict[Reduction, str] = {
    "mean": "mean over heads",
    "min": "least over heads",
    "max": "largest over heads",
}


def metric_words(metric: str) -> str:
    """What a metric is, with its unit: of `entropy_min`, of `grad_linf`, and so on."""
    if metric in HEAD_METRICS:
        column, how = HEAD_METRICS[metric]
        return f"{HEADS[column].doc}; {_OVER_HEADS[how]}"
    return LAYERS[metric].doc


@dataclass(frozen=True)
class LayerAggregate:
    """What one attention call of one layer comes to in one record.

    Attributes:
        layer: qualified name of the layer.
        index: its place in order of execution.
        call: nth attention call of the layer within one forward, from 0.
        heads: how many query heads the call has in this record.
        values: metric to value; what is not known is not there.
    """

    layer: str
    index: int
    call: int
    heads: int
    values: dict[str, float]

    @property
    def tag(self) -> str:
        """Where its metrics stand: `attention/layer_03`, or `attention/layer_03/call_1`."""
        return layer_tag(self.index, self.call)


def layer_tag(index: int, call: int = 0) -> str:
    """The name that the metrics of a layer's call stand under; the first call has no suffix."""
    tag = f"{PREFIX}/layer_{index:02d}"
    return tag if call == 0 else f"{tag}/call_{call}"


def aggregate_layers(record: Record) -> list[LayerAggregate]:
    """Reduces the heads of each layer's call to its metrics, in order of layer and call.

    Rows of `layers` go to the layer's first call; a layer with such a row and no heads has 0 heads.
    """
    values: dict[tuple[int, int], dict[str, float]] = {}
    names: dict[tuple[int, int], str] = {}
    counts: dict[tuple[int, int], int] = {}
    heads = record.heads
    if len(heads["head"]):
        order, starts = call_groups(heads)
        sizes = np.diff(np.append(starts, len(order)))
        reduced = [
            (
                metric,
                _NULLABLE[column],
                _reduce(numbers(heads, column)[order], starts, how, _NULLABLE[column]),
            )
            for metric, (column, how) in HEAD_METRICS.items()
        ]
        # Lists from here on: a number taken out of an array costs more than all that is done with it.
        lists = [(metric, nullable, column.tolist()) for metric, nullable, column in reduced]
        for group, first in enumerate(order[starts].tolist()):
            key = int(heads["layer_index"][first]), int(heads["call"][first])
            names[key] = str(heads["layer"][first])
            counts[key] = int(sizes[group])
            values[key] = {
                metric: column[group]
                for metric, nullable, column in lists
                if not (nullable and math.isnan(column[group]))
            }
    of_layers = {metric: numbers(record.layers, metric).tolist() for metric in LAYER_METRICS}
    for row, index in enumerate(record.layers["layer_index"]):
        key = int(index), 0
        names.setdefault(key, str(record.layers["layer"][row]))
        known = values.setdefault(key, {})
        known |= {metric: x[row] for metric, x in of_layers.items() if not math.isnan(x[row])}
    return [LayerAggregate(names[key], *key, counts.get(key, 0), values[key]) for key in sorted(values)]


def entropy_share(heads: Columns) -> FloatArray:
    """Entropy of each row as a share of its maximum: 1 is uniform attention, 0 a single key.

    Null (NaN) where rows see a single key, whose entropy can only be 0. Shape `[rows]`, float64.
    """
    most = numbers(heads, "max_entropy")
    share: FloatArray = np.full(len(most), np.nan)
    np.divide(numbers(heads, "entropy"), most, out=share, where=most > 0)
    return share


def numbers(table: Columns, column: str) -> FloatArray:
    """A column in float64, shape `[rows]`."""
    return np.asarray(table[column], dtype=np.float64)


def call_groups(heads: Columns) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Row order that puts the heads of a call together, and where each call starts in it.

    There must be at least one row.
    """
    index, call = np.asarray(heads["layer_index"]), np.asarray(heads["call"])
    order = np.lexsort((np.asarray(heads["head"]), call, index))
    changed = (np.diff(index[order]) != 0) | (np.diff(call[order]) != 0)
    return order, np.append(0, np.flatnonzero(changed) + 1)


def _reduce(values: FloatArray, starts: npt.NDArray[np.intp], how: Reduction, nullable: bool) -> FloatArray:
    """Reduces each group; NaN is skipped where it means null, and kept where it is a reading."""
    if how == "mean":
        counted = ~np.isnan(values) if nullable else np.ones(len(values), dtype=bool)
        total = np.add.reduceat(np.where(counted, values, 0.0), starts)
        count = np.add.reduceat(counted.astype(np.float64), starts)
        mean: FloatArray = np.full(len(total), np.nan)
        return np.divide(total, count, out=mean, where=count > 0)
    pick: dict[tuple[str, bool], Callable[..., FloatArray]] = {
        ("min", True): np.fmin.reduceat,
        ("min", False): np.minimum.reduceat,
        ("max", True): np.fmax.reduceat,
        ("max", False): np.maximum.reduceat,
    }
    return pick[how, nullable](values, starts)
