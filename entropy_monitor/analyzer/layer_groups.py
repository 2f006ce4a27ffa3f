"""The slots of which something is true, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from entropy_monitor.analyzer.slots import BoolArray, FloatArray, HeadIndex, IntArray


@dataclass(frozen=True)
class LayerGroup:
    """The slots of one layer that are on.

    Attributes:
        number: of the layer, in `HeadIndex.layers`.
        layer: its qualified name.
        slots: ascending, at least one.
        heads: their distinct query heads, ascending.
        of: how many query heads the layer has.
    """

    number: int
    layer: str
    slots: IntArray
    heads: tuple[int, ...]
    of: int

    def first_step(self, since: FloatArray) -> int:
        """The earliest first sign among the slots; `since` has shape [slots of all layers]."""
        return int(since[self.slots].min())


class LayerGroups:
    """Groups slots by layer; what stays on from record to record is grouped once."""

    def __init__(self) -> None:
        self._layer: IntArray | None = None
        self._on: BoolArray | None = None
        self._groups: list[LayerGroup] = []

    def of(self, index: HeadIndex, on: BoolArray) -> list[LayerGroup]:
        """The groups, in the order of layers.

        Args:
            index: the numbering of heads.
            on: whether each slot is on, shape [slots].
        """
        # The index makes a new array whenever it changes.
        if self._layer is not index.layer or self._on is None or not np.array_equal(on, self._on):
            self._layer, self._on = index.layer, on
            self._groups = _grouped(index, on)
        return self._groups


def _grouped(index: HeadIndex, on: BoolArray) -> list[LayerGroup]:
    slots = np.flatnonzero(on)
    slots = slots[np.argsort(index.layer[slots], kind="stable")]
    numbers, starts = np.unique(index.layer[slots], return_index=True)
    groups = []
    for number, of_layer in zip(numbers.tolist(), np.split(slots, starts[1:]), strict=False):
        heads = tuple(sorted(set(index.head[of_layer].tolist())))
        groups.append(LayerGroup(number, index.layers[number], of_layer, heads, index.heads_in[number]))
    return groups
