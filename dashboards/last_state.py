"""The last that is known of every head and layer: norms are read in some records only."""

from __future__ import annotations

import numpy as np

from entropy_monitor.records import HEADS, Columns
from entropy_monitor.trackers.aggregates import LayerAggregate

_NULLABLE = [column.name for column in HEADS.columns if column.nullable]
_PLACE = ("layer_index", "call", "head")


class LastState:
    """Keeps the last record's heads and layers, what is null in it as it was last known."""

    def __init__(self) -> None:
        self._heads: Columns = HEADS.empty()
        self._layers: dict[tuple[int, int], LayerAggregate] = {}

    def take(self, heads: Columns, layers: list[LayerAggregate]) -> None:
        """Takes a record in; one without heads changes nothing."""
        if not len(heads["head"]):
            return
        if self._same_places(heads):
            filled = dict(heads)
            for name in _NULLABLE:
                now = np.asarray(heads[name])
                filled[name] = np.where(np.isnan(now), np.asarray(self._heads[name]), now)
            heads = filled
        self._heads = heads
        for layer in layers:
            key = layer.index, layer.call
            before = self._layers.get(key)
            known = layer.values if before is None else before.values | layer.values
            self._layers[key] = LayerAggregate(layer.layer, *key, layer.heads, known)

    @property
    def heads(self) -> Columns:
        """Rows of the last record."""
        return self._heads

    @property
    def layers(self) -> list[LayerAggregate]:
        """Every call that was seen, in order."""
        return [self._layers[key] for key in sorted(self._layers)]

    def _same_places(self, heads: Columns) -> bool:
        return all(np.array_equal(heads[name], self._heads[name]) for name in _PLACE)
