"""Where what is remembered of each head lies: a slot for life, and arrays over all slots.

A head's slot is its place in every array. Heads may come and go between records, so slots are never
moved.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from entropy_monitor.records import Array, Columns

FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
State: TypeAlias = dict[str, Any]


class HeadIndex:
    """Numbers the heads (layer, call, head) in the order in which they are first met.

    Attributes:
        layers: names of the layers met, in order.
        layer: per slot, the number of its layer in `layers`.
        call: per slot, the attention call of the layer.
        head: per slot, the query head.
        slots_of: per layer, its slots.
        heads_in: per layer, how many distinct query heads it was met with.
        in_order: whether the rows placed last are all slots, in their order.
    """

    def __init__(self) -> None:
        self.layers: list[str] = []
        self.layer: IntArray = np.empty(0, dtype=np.int64)
        self.call: IntArray = np.empty(0, dtype=np.int64)
        self.head: IntArray = np.empty(0, dtype=np.int64)
        self.slots_of: list[IntArray] = []
        self.heads_in: list[int] = []
        self.in_order = False
        self._layer_ids: dict[str, int] = {}
        self._slots: dict[tuple[int, int, int], int] = {}
        self._last: tuple[list[str], Array, Array, IntArray] | None = None

    def __len__(self) -> int:
        return len(self.head)

    def place(self, columns: Columns) -> IntArray:
        """The slot of each row of a `heads` table, new heads being given new slots.

        The mapping of the last record is used again when the keys are the same, as they are in most
        runs.
        """
        names = columns.get("layer", ())
        calls, heads = np.asarray(columns.get("call", ())), np.asarray(columns.get("head", ()))
        if self._last is not None:
            last_names, last_calls, last_heads, slots = self._last
            if (
                len(calls) == len(heads) == len(last_names)
                and (heads == last_heads).all()
                and (calls == last_calls).all()
                and list(names) == last_names
            ):
                return slots
        slots = np.array(
            [
                self._slot(name, int(call), int(head))
                for name, call, head in zip(names, calls, heads, strict=True)
            ],
            dtype=np.int64,
        )
        self._sync()
        self.in_order = np.array_equal(slots, np.arange(len(self)))
        self._last = (list(names), calls.copy(), heads.copy(), slots)
        return slots

    def state_dict(self) -> State:
        """What `load_state_dict` needs to give the same heads the same slots."""
        return {
            "layers": list(self.layers),
            "layer": self.layer.tolist(),
            "call": self.call.tolist(),
            "head": self.head.tolist(),
        }

    def load_state_dict(self, state: State) -> None:
        """Take over the numbering that `state_dict` gave."""
        self.layers, self._layer_ids, self._slots, self._last = [], {}, {}, None
        self.layer = self.call = self.head = np.empty(0, dtype=np.int64)
        layers = state["layers"]
        for layer, call, head in zip(state["layer"], state["call"], state["head"], strict=True):
            self._slot(layers[layer], call, head)
        self._sync()

    def _slot(self, layer: str, call: int, head: int) -> int:
        if layer not in self._layer_ids:
            self._layer_ids[layer] = len(self.layers)
            self.layers.append(layer)
        key = (self._layer_ids[layer], call, head)
        return self._slots.setdefault(key, len(self._slots))

    def _sync(self) -> None:
        if len(self._slots) > len(self):
            keys = np.array(list(self._slots), dtype=np.int64)
            self.layer, self.call, self.head = keys.T.copy()
            self.slots_of = [np.flatnonzero(self.layer == i) for i in range(len(self.layers))]
            self.heads_in = [len(np.unique(self.head[slots])) for slots in self.slots_of]


class SlotArrays:
    """Named float64 arrays of one length, grown with a fill value; NaN stands for "not known yet".

    Args:
        fills: name and fill value of each array.
    """

    def __init__(self, **fills: float) -> None:
        self._fills = fills
        self._arrays: dict[str, FloatArray] = {name: np.empty(0) for name in fills}
        self._size = 0

    def __getitem__(self, name: str) -> FloatArray:
        return self._arrays[name]

    def grow(self, size: int) -> None:
        """Make the arrays at least `size` long."""
        if size <= self._size:
            return
        for name, fill in self._fills.items():
            array = self._arrays[name]
            self._arrays[name] = np.concatenate([array, np.full(size - len(array), fill)])
        self._size = size

    def state_dict(self) -> State:
        """The arrays as lists, with None for NaN: strict JSON knows no NaN."""
        return {
            name: [None if value != value else value for value in array.tolist()]
            for name, array in self._arrays.items()
        }

    def load_state_dict(self, state: State) -> None:
        """Take over the arrays that `state_dict` gave."""
        for name in self._fills:
            self._arrays[name] = np.array(
                [np.nan if value is None else value for value in state[name]], dtype=np.float64
            )
        self._size = min(len(array) for array in self._arrays.values())
