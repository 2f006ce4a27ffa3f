"""How many rows are read, and how often, where the user leaves it to the monitor."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal

from entropy_monitor.cost import Cost, Share
from entropy_monitor.precision import Precision
from entropy_monitor.records import Array
from entropy_monitor.schedule import IN_FULL

ROWS = 32
"""Rows of each sequence at first; see `measures.rows_for`."""

EVERY = 10
"""Steps between measurements at first, and never fewer."""

BUDGET = 0.01
"""Share of the training's time that measuring may take."""

_MOST_ROWS = 2**20  # more than any sequence has: all of them
_MOST_STEPS = 64 * EVERY  # what a wrong account of the cost can do at worst
# Shares of a limit that a forecast must keep to, so that noise does not turn a change back.
_MARGIN = 0.7  # of the cost
_ROWS_MARGIN = 0.5  # of the squared standard error, whose spread is known from few readings

_COST = "measuring took {:.1%} of the time"


class Plan:
    """The cheapest plan that is precise enough, within a budget.

    Rows double while the standard error of the median head is above a third of the batch-to-batch spread and
    the cost leaves room for it, and go back by halves. `every` doubles while measuring costs more than the
    budget, and comes back to where it started. Nothing changes twice for one reason: a step back is taken
    only where its forecast lies well below the limit.

    Args:
        rows: a number or "all", which is kept; or "auto".
        every: a number, which is kept; or "auto".
        budget: share of the training's time; None for no limit, and an `every` that stays.
        fixed: change nothing, since other processes must measure the same.
        clock: seconds, monotonic.

    Attributes:
        every: steps between measurements now.
        adapt_to_batch: whether the number of rows is to be raised where the batch is small.
    """

    def __init__(
        self,
        rows: int | Literal["all", "auto"],
        every: int | Literal["auto"],
        budget: float | None = BUDGET,
        *,
        fixed: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._given = rows
        self._rows = ROWS
        self.every = EVERY if every == "auto" else every
        self.adapt_to_batch = rows == "auto"
        self._rows_move = rows == "auto" and not fixed
        self._every_moves = every == "auto" and budget is not None and not fixed
        self._budget = budget
        self._cost = Cost(self.every, clock, 1 / IN_FULL)
        self._precision = Precision()

    @property
    def rows(self) -> int | Literal["all"]:
        """To read of each sequence now."""
        return self._rows if self._given == "auto" else self._given

    def observe(self, heads: Hashable, entropy: Array, error: Array) -> None:
        """Take what a measured step brought; see `Precision.observe`."""
        if self._rows_move:
            self._precision.observe(heads, entropy, error)

    def end(self, step: int, measured: bool, in_full: bool = False) -> str | None:
        """Note that a step ended; returns what has changed and why, in words, if anything has.

        Args:
            step: its number.
            measured: whether it was measured.
            in_full: whether it was read in full, see `Schedule.in_full`.
        """
        if not self._rows_move and not self._every_moves:
            return None
        self._cost.end(step, measured, in_full)
        return self._revise(self._cost.share(self.every)) if measured else None

    def state_dict(self) -> dict[str, Any]:
        """What is planned; JSON-able."""
        return {"rows": self._rows, "every": self.every}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there with what is not given or fixed."""
        if self._rows_move:
            self._rows = state["rows"]
        if self._every_moves:
            self.every = max(EVERY, state["every"])
        self._cost.pause()

    def _revise(self, share: Share | None) -> str | None:
        limit = math.inf if self._budget is None else self._budget
        if share is not None and share.least > limit:
            if self._rows > ROWS and self._rows_move:
                return self._read(0.5, _COST.format(share.likely))
            return self._space(2 ** math.ceil(math.log2(share.likely / limit)), share)
        # As long as the cost is not known, no more is spent.
        may_double = self._budget is None if share is None else 2 * share.most <= _MARGIN * limit
        if share is not None and may_double and self.every > EVERY and self._every_moves:
            return self._space(0.5, share)
        if not self._rows_move:
            return None
        excess, excess_with_half = self._precision.excess, self._precision.excess_with_half
        if excess is not None and excess > 1 and may_double and self._rows < _MOST_ROWS:
            return self._read(2, "the standard error was above a third of the batch-to-batch spread")
        if excess_with_half is not None and excess_with_half <= _ROWS_MARGIN and self._rows > ROWS:
            return self._read(0.5, "the standard error was far below a third of the batch-to-batch spread")
        return None

    def _read(self, growth: float, why: str) -> str:
        self._rows = int(self._rows * growth)
        self._cost.forget_measured()
        self._precision.forget(growth)
        return f"{self._rows} rows of each sequence are read: {why}"

    def _space(self, growth: float, share: Share) -> str | None:
        every = min(_MOST_STEPS, max(EVERY, int(self.every * growth)))
        if not self._every_moves or every == self.every:
            return None
        self.every = every
        return f"1 step in {every} is measured: {_COST.format(share.likely)}"
