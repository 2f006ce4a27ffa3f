"""Hysteresis: what must persist to count, and must be over for a while to count no more."""

from __future__ import annotations

import numpy as np

from entropy_monitor.analyzer.slots import BoolArray, FloatArray, SlotArrays, State


class Latch:
    """A switch per slot: on after some consecutive records of one sign, off after some of the other.

    Slots that are absent from a record keep their state and their counts.

    Args:
        on_after: consecutive records with `enter` that switch a slot on.
        off_after: consecutive records with `leave` that switch it off.
    """

    def __init__(self, on_after: int, off_after: int) -> None:
        self._on_after = on_after
        self._off_after = off_after
        self._state = SlotArrays(ill=0.0, well=0.0, on=0.0, since=float("nan"))
        self._idle = True  # no slot is on or counting towards it

    @property
    def on(self) -> BoolArray:
        """Per slot, whether it is on. Shape [slots]."""
        on: BoolArray = self._state["on"] > 0
        return on

    @property
    def near(self) -> BoolArray:
        """Per slot, whether it is on or one more record could switch it on. Shape [slots]."""
        near: BoolArray = self._state["ill"] >= max(1, self._on_after - 1)
        return near | self.on

    @property
    def idle(self) -> bool:
        """Whether no slot is on, nor about to be."""
        return self._idle

    @property
    def since(self) -> FloatArray:
        """Per slot, the step at which the streak began that switched it on. Shape [slots]."""
        return self._state["since"]

    def grow(self, size: int) -> None:
        """Make room for `size` slots."""
        self._state.grow(size)

    def update(self, seen: BoolArray, enter: BoolArray, leave: BoolArray, step: int) -> None:
        """Count one record.

        Args:
            seen: whether each slot was measured, shape [slots].
            enter: whether each looks ill, shape [slots]; False where it was not measured.
            leave: whether each looks well, shape [slots], never together with `enter`; between the two
                nothing is switched.
            step: the record's step.
        """
        # Signs of health count in slots that are on, and a slot that goes on has just shown none.
        if self._idle and not enter.any():
            return
        ill, well, on, since = (self._state[name] for name in ("ill", "well", "on", "since"))
        since[enter & (ill == 0) & (on == 0)] = step
        np.copyto(ill, (ill + 1) * enter, where=seen)
        np.copyto(well, (well + 1) * leave, where=seen)
        on[seen & (ill >= self._on_after)] = 1.0
        on[seen & (well >= self._off_after)] = 0.0
        self._idle = not (ill.any() or on.any())

    def state_dict(self) -> State:
        """All counts and switches."""
        return self._state.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Take over what `state_dict` gave."""
        self._state.load_state_dict(state)
        self._idle = not (self._state["ill"].any() or self._state["on"].any())
