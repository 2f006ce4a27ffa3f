"""Notes on tensors, that keep no tensor alive and go when it goes."""

from __future__ import annotations

import weakref
from typing import Generic, TypeVar

from torch import Tensor

N = TypeVar("N")


class Notes(Generic[N]):
    """A dict from tensor to note, by identity."""

    def __init__(self) -> None:
        self._notes: dict[int, tuple[weakref.ref[Tensor], N]] = {}

    def __bool__(self) -> bool:
        return bool(self._notes)

    def put(self, tensor: Tensor, note: N) -> None:
        """Attach a note, in place of an earlier one."""
        key = id(tensor)
        notes = self._notes

        def forget(reference: weakref.ref[Tensor]) -> None:
            entry = notes.get(key)
            if entry is not None and entry[0] is reference:
                del notes[key]

        notes[key] = (weakref.ref(tensor, forget), note)

    def get(self, tensor: Tensor) -> N | None:
        """The note on a tensor, if there is one."""
        entry = self._notes.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None
