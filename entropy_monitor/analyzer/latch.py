"""Hysteresis: what must persist to count, and must be over for a while to count no more."""

from __future__ import annotations

from entropy_monitor.analyzer.slots import BoolArray, FloatArray, IntArray, SlotArrays, State


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

    @property
    def on(self) -> BoolArray:
        """Per slot, whether it is on. Shape [slots]."""
        on: BoolArray = self._state["on"] > 0
        return on

    @property
    def since(self) -> FloatArray:
        """Per slot, the step at which the streak began that switched it on. Shape [slots]."""
        return self._state["since"]

    def grow(self, size: int) -> None:
        """Make room for `size` slots."""
        self._state.grow(size)

    def update(self, at: IntArray, enter: BoolArray, leave: BoolArray, step: int) -> None:
        """Count one record.

        Args:
            at: the slots that were measured, shape [R], no slot twice.
            enter: whether each looks ill, shape [R].
            leave: whether each looks well, shape [R]; between the two nothing is switched.
            step: the record's step.
        """
        if not len(at):
            return
        ill, well, on, since = (self._state[name] for name in ("ill", "well", "on", "since"))
        fresh = at[enter & (ill[at] == 0) & (on[at] == 0)]
        since[fresh] = step
        ill[at] = (ill[at] + 1) * enter
        well[at] = (well[at] + 1) * leave
        on[at[ill[at] >= self._on_after]] = 1.0
        on[at[well[at] >= self._off_after]] = 0.0

    def state_dict(self) -> State:
        """All counts and switches."""
        return self._state.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Take over what `state_dict` gave."""
        self._state.load_state_dict(state)
