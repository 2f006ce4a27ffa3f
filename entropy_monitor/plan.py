"""How many rows are read, and how often, where the user leaves it to the monitor."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Any, Literal, NamedTuple

from entropy_monitor.cost import Cost, Share
from entropy_monitor.precision import Precision
from entropy_monitor.records import Array
from entropy_monitor.schedule import IN_FULL

ROWS = 32
"""Rows of each sequence at first; see `measures.rows_for`."""

EVERY = 10
"""Steps between measurements at first, and never fewer."""

MOST_STEPS = 16 * EVERY
"""And never longer blocks: what happens between two measurements is seen that late, or twice as late."""

BUDGET = 0.01
"""Share of the training's time that measuring may take."""

_MOST_ROWS = 2**20  # more than any sequence has: all of them
# Shares of a limit that a forecast must keep to, so that noise does not turn a change back.
_MARGIN = 0.7  # of the cost
_ROWS_MARGIN = 0.5  # of the squared standard error, whose spread is known from few readings
_CLOSELY = 8  # measurements after a first sign that follow one another as at first
_AGAIN = 64  # measurements before a layer's signs count as first ones again


class Change(NamedTuple):
    """What is planned anew.

    Attributes:
        text: what and why, in words.
        is_rarer: whether fewer steps are measured than before: alerts may come later.
    """

    text: str
    is_rarer: bool


class Plan:
    """The cheapest plan that is precise enough, within a budget.

    Rows follow the tolerance: they double while the standard error of the median head is above a third of the
    batch-to-batch spread, and go back by halves. Steps follow the budget: `every` doubles while measuring
    costs more, and comes back to where it started. Only where that does not suffice are rows given up for the
    budget. Nothing goes back unless its forecast lies well below the limit.

    After a first sign of trouble in a layer, the next measurements come as close to one another as at first.

    Args:
        rows: a number or "all", which is kept; or "auto".
        every: a number, which is kept; or "auto".
        budget: share of the training's time; None for no limit, and an `every` that stays.
        fixed: change nothing, since other processes must measure the same.
        clock: seconds, monotonic.

    Attributes:
        adapt_to_batch: whether the number of rows is to be raised where the batch is small.
        every_moves: whether `every` follows the budget.
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
        self._most_rows = _MOST_ROWS
        self._every = EVERY if every == "auto" else every
        self.adapt_to_batch = rows == "auto"
        self.every_moves = every == "auto" and budget is not None and not fixed
        self._rows_move = rows == "auto" and not fixed
        self._budget = budget
        self._cost = Cost(1 / IN_FULL, clock)
        self._precision = Precision()
        self._measurements = 0
        self._closely = 0  # measurements still to come
        self._signs: dict[str, int] = {}  # layers, and how many measurements had been made at their first

    @property
    def rows(self) -> int | Literal["all"]:
        """To read of each sequence now."""
        return self._rows if self._given == "auto" else self._given

    @property
    def every(self) -> int:
        """Steps between measurements in the long run."""
        return self._every

    @property
    def every_now(self) -> int:
        """Steps between measurements now."""
        return EVERY if self._closely and self.every_moves else self._every

    def observe(self, heads: Hashable, entropy: Array, error: Array) -> None:
        """Take what a measured step brought; see `Precision.observe`."""
        if self._rows_move:
            self._precision.observe(heads, entropy, error)

    def suspect(self, layers: Collection[str]) -> None:
        """Look closely where layers show signs of trouble that they did not show before."""
        now = self._measurements
        if any(now - self._signs.get(layer, -_AGAIN) >= _AGAIN for layer in layers):
            self._closely = _CLOSELY
        self._signs.update(dict.fromkeys(layers, now))

    def end(self, measured: bool, in_full: bool = False) -> Change | None:
        """Note that a step ended; returns what has changed, if anything has.

        Args:
            measured: whether it was measured.
            in_full: whether it was read in full, see `Schedule.in_full`.
        """
        self._measurements += measured
        self._closely -= measured and self._closely > 0
        if self.every_moves:
            self._cost.end(measured, in_full)
        if not measured:
            return None
        share = self._cost.share(self._every) if self.every_moves else None
        return self._follow_budget(share) or self._follow_tolerance()

    def state_dict(self) -> dict[str, Any]:
        """What is planned, and what measuring took; JSON-able."""
        return {
            "rows": self._rows,
            "most_rows": self._most_rows,
            "every": self._every,
            "cost": self._cost.state_dict(),
            "measurements": self._measurements,
            "closely": self._closely,
            "signs": dict(self._signs),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there with what is not given or fixed.

        Raises:
            KeyError, TypeError, ValueError: it is damaged.
        """
        rows, most_rows, every, measurements, closely = (
            operator.index(state[name]) for name in ("rows", "most_rows", "every", "measurements", "closely")
        )
        if min(rows, most_rows, every) < 1:
            raise ValueError(f"rows={rows}, most_rows={most_rows} and every={every} must be positive")
        self._measurements, self._closely = measurements, min(closely, _CLOSELY)
        self._signs = {str(layer): operator.index(count) for layer, count in state["signs"].items()}
        if self._rows_move:
            self._rows, self._most_rows = rows, most_rows
        if self.every_moves:
            steps = EVERY
            while steps < min(every, MOST_STEPS):
                steps *= 2
            self._every = steps
            self._cost.load_state_dict(state["cost"])

    def _follow_budget(self, share: Share | None) -> Change | None:
        if share is None or self._budget is None:
            return None
        if share.least > self._budget:
            if self._every < MOST_STEPS:
                return self._measure_each(2 * self._every, share)
            if self._rows > ROWS and self._rows_move:
                self._most_rows = self._rows // 2
                return self._read(0.5, f"measuring takes {share.likely:.1%} of the time")
        elif 2 * share.most <= _MARGIN * self._budget and self._every > EVERY:
            self._most_rows = _MOST_ROWS
            return self._measure_each(self._every // 2, share)
        return None

    def _follow_tolerance(self) -> Change | None:
        if not self._rows_move:
            return None
        excess, excess_with_half = self._precision.excess, self._precision.excess_with_half
        if excess is not None and excess > 1 and self._rows < self._most_rows:
            return self._read(2, "the standard error was above a third of the batch-to-batch spread")
        if excess_with_half is not None and excess_with_half <= _ROWS_MARGIN and self._rows > ROWS:
            return self._read(0.5, "the standard error was far below a third of the batch-to-batch spread")
        return None

    def _read(self, growth: float, why: str) -> Change:
        self._rows = int(self._rows * growth)
        self._cost.other_rows()
        self._precision.forget(growth)
        return Change(f"{self._rows} rows of each sequence are read: {why}", False)

    def _measure_each(self, every: int, share: Share) -> Change:
        is_rarer, self._every = every > self._every, every
        return Change(
            f"1 step in {every} is measured: measuring takes {share.likely:.1%} of the time", is_rarer
        )
