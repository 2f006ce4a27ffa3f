"""`KeptArrays`: what was read, kept as long as there is room for it."""

from __future__ import annotations

import threading
import weakref
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt

_MOST_BYTES = 1_500_000_000
"""Of all arrays of this process; those that were not asked for longest go first."""

_all: weakref.WeakSet[KeptArrays] = weakref.WeakSet()
_lock = threading.Lock()
_clock = count()


class KeptArray:
    """An array that grows at its end.

    Attributes:
        valid: how many of its first entries are as they should be.
    """

    def __init__(self) -> None:
        self.valid = 0
        self._values: npt.NDArray[Any] = np.empty(0, np.float32)

    @property
    def nbytes(self) -> int:
        """How much memory it takes."""
        return self._values.nbytes

    def put(self, start: int, values: npt.NDArray[Any]) -> None:
        """Makes `values` its entries from `start`, at most `valid`, on."""
        stop = start + len(values)
        if start == 0:
            self._values = values
        elif stop > len(self._values):
            grown = np.empty((stop + stop // 4, *values.shape[1:]), values.dtype)
            grown[:start] = self._values[:start]
            self._values = grown
        if start > 0:
            self._values[start:stop] = values
        self.valid = stop

    def view(self) -> npt.NDArray[Any]:
        """Its valid entries, read-only."""
        shown = self._values[: self.valid]
        shown.flags.writeable = False
        return shown


class KeptArrays:
    """Arrays by name. Of all such collections together no more are kept than there is room for.

    Whoever holds an array that is dropped may go on using it; the next one to ask gets a new, empty one.
    """

    def __init__(self) -> None:
        self._arrays: dict[str, KeptArray] = {}
        self._used = -1
        with _lock:
            _all.add(self)

    def of(self, name: str) -> KeptArray:
        """The array of this name, which counts as used now."""
        array = self._arrays.pop(name, None) or KeptArray()
        self._arrays[name] = array  # the most recently used one stands last
        self._used = next(_clock)
        return array

    def cut(self, valid: int) -> None:
        """No array is valid beyond so many entries."""
        for array in list(self._arrays.values()):
            array.valid = min(array.valid, valid)

    def clear(self) -> None:
        """Forgets all of them."""
        self._arrays.clear()

    def make_room(self) -> None:
        """Drops what was not used longest, in all collections; of this one, the last array stays."""
        with _lock:
            owners = sorted(_all, key=lambda owner: owner._used)
            surplus = (
                sum(array.nbytes for owner in owners for array in list(owner._arrays.values())) - _MOST_BYTES
            )
            for owner in owners:
                for name in list(owner._arrays)[: -1 if owner is self else None]:
                    if surplus <= 0:
                        return
                    dropped = owner._arrays.pop(name, None)
                    surplus -= dropped.nbytes if dropped else 0
