"""How often something large is drawn: often at first, ever more seldom as a run grows."""

from __future__ import annotations

from entropy_monitor.errors import ConfigurationError

GROWTH = 0.25
"""Least distance to the next drawing, as a share of the records seen so far."""


class Cadence:
    """Says which records of a run to draw: the first, then every `every`-th, then ever fewer.

    After record n the next one drawn lies `max(every, n / 4)` records on, so that what is drawn
    grows with the logarithm of the run only: with `every=10`, 50 drawings in a million records.

    Args:
        every: records between two drawings at the start of a run; 0 draws nothing.
        option: the name of the user's option, for the error's text.

    Raises:
        ConfigurationError: `every` is negative or no whole number.
    """

    def __init__(self, every: int, option: str) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 0:
            raise ConfigurationError(f"{option} is {every!r}; give a whole number of records, 0 for never")
        self._every = every
        self._seen = 0
        self._next = 0

    def due(self) -> bool:
        """Counts one record, and says whether it is to be drawn."""
        now = self._seen
        self._seen += 1
        if self._every == 0 or now < self._next:
            return False
        self._next = now + max(self._every, int(now * GROWTH))
        return True
