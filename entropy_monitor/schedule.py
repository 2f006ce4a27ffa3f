"""Which training steps are measured."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping

_FIRST_IN_FULL = 8
IN_FULL = 4
"""Of so many measurements one is read in full."""
_STATE = ("next", "last", "calls", "measured", "count")
_GOLDEN = (math.sqrt(5) - 1) / 2


class Schedule:
    """One measured step in every block of `every` steps.

    Where `every` is the user's, blocks go by whatever numbers the user gives to steps; the coming step's
    number is foretold from the last two, so that counting by twos, or in samples, is followed.

    Args:
        every: steps of a block.
        spread: count calls, whatever numbers they bear, and measure another place of each block: what the
            training does in every tenth step then falls upon measured and other steps alike.

    Attributes:
        every: steps of a block; when it changes, the step that was measured last counts for its block of the
            new length.
        next: the number that the coming step is expected to have.
    """

    def __init__(self, every: int, *, spread: bool = False) -> None:
        self.next = 0
        self.every = every
        self._spread = spread
        self._last: int | None = None
        self._calls = 0
        self._measured: int | None = None  # its number, or how many calls came before it
        self._count = 0  # measurements so far

    @property
    def due(self) -> bool:
        """Whether the coming step is to be measured."""
        place = self._calls if self._spread else self.next
        block = place // self.every
        if self._measured is not None and block == self._measured // self.every:
            return False
        return not self._spread or place % self.every >= int(block * _GOLDEN % 1 * self.every)

    @property
    def in_full(self) -> bool:
        """Whether the coming step, if it is measured, is read in full: weights, gradients and updates too.

        They cost several times what rows of attention do, and change slowly: the first measurements are in
        full, and then one of four.
        """
        return self._count < _FIRST_IN_FULL or self._count % IN_FULL == 0

    def number(self, step: object) -> int:
        """The number of the step that ends: the user's, or the expected one for None.

        Raises:
            TypeError: the user's is no integer.
        """
        return self.next if step is None else operator.index(step)  # type: ignore[arg-type]

    def end(self, step: int, measured: bool) -> None:
        """Note that a step ended."""
        stride = 1 if self._last is None else max(1, step - self._last)
        self._last, self.next = step, step + stride
        if measured:
            self._measured = self._calls if self._spread else step
            self._count += 1
        self._calls += 1

    def state_dict(self) -> dict[str, int | None]:
        """Where the run is."""
        return {
            "next": self.next,
            "last": self._last,
            "calls": self._calls,
            "measured": self._measured,
            "count": self._count,
        }

    def load_state_dict(self, state: Mapping[str, int | None]) -> None:
        """Go on from there.

        Raises:
            KeyError, TypeError: it is damaged.
        """
        found = {name: state[name] for name in _STATE}
        numbers = {name: None if value is None else operator.index(value) for name, value in found.items()}
        self.next = numbers["next"] or 0
        self._last = numbers["last"]
        self._calls = numbers["calls"] or 0
        self._measured = numbers["measured"]
        self._count = numbers["count"] or 0
