"""How much of the training's time the measuring takes."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Collection
from statistics import median
from typing import NamedTuple

_WARM_UP = 3  # measured steps that may compile, allocate and tune
_PLAIN = 32  # latest unmeasured steps: what a step takes now
_ENOUGH = 8  # of each kind, for a median and its error
_FEW = 4  # of those that are read in full
_KEPT = 128  # of each kind
_CERTAIN = 2.0  # standard errors
_DEVIATION = 1.4826 * math.sqrt(math.pi / 2)  # of a median, times √n, by the median absolute deviation


class Share(NamedTuple):
    """A share of the training's time: the most likely one, and the bounds that noise leaves possible."""

    likely: float
    least: float
    most: float


class Cost:
    """Difference of the medians of whole steps, measured and not, from the end of one to the end of the next.

    Each measured step is taken relative to the unmeasured ones shortly before, so that a training that
    becomes slower or faster does not matter; medians leave out what happens now and then, such as an
    evaluation. What training itself does in every tenth step, such as logging, would still pass for the
    monitor's. So what those unmeasured steps take that begin a block of `block` steps is subtracted, once
    there are some: with every=20 the steps 10, 30, 50, …

    Args:
        block: steps between measurements at first.
        clock: seconds, monotonic.
        full_share: of the measured steps, in the long run, that are read in full.
    """

    def __init__(
        self, block: int, clock: Callable[[], float] = time.monotonic, full_share: float = 0.0
    ) -> None:
        self._block = block
        self._full_share = full_share
        self._clock = clock
        self._time: float | None = None
        self._step = -1
        self._warm_up = _WARM_UP
        self._plain: deque[float] = deque(maxlen=_PLAIN)
        self._measured: deque[float] = deque(maxlen=_KEPT)  # relative to plain steps
        self._in_full: deque[float] = deque(maxlen=_KEPT)  # measured ones that read more; relative too
        self._alike: deque[float] = deque(maxlen=_KEPT)  # unmeasured, and first of a block; relative too

    def end(self, step: int, measured: bool, in_full: bool = False) -> None:
        """Note that a step ended now.

        Args:
            step: its number.
            measured: whether it was measured.
            in_full: whether more was read than in most measured steps.
        """
        (before, self._time), (last, self._step) = (self._time, self._clock()), (self._step, step)
        if self._warm_up:
            self._warm_up -= measured
        elif before is not None:
            seconds = self._time - before
            is_first = step // self._block != last // self._block
            if not measured and not is_first:
                self._plain.append(seconds)
            elif len(self._plain) >= _ENOUGH and (usual := median(self._plain)) > 0:
                kind = self._alike if not measured else self._in_full if in_full else self._measured
                kind.append(seconds / usual)

    def forget_measured(self) -> None:
        """Measured steps will cost something else from now on."""
        self._measured.clear()
        self._in_full.clear()

    def pause(self) -> None:
        """What passes until the next step ends is no step's."""
        self._time = None

    def share(self, every: int) -> Share | None:
        """What measuring one step in `every` adds to a training without, relative to it; None: not known."""
        seen = len(self._measured)
        if seen + len(self._in_full) < _ENOUGH:
            return None
        # At first all are read in full: what costs far too much is seen before there are others.
        more, error = _median(self._measured if seen >= _ENOUGH else [*self._measured, *self._in_full])
        if seen >= _ENOUGH and len(self._in_full) >= _FEW:  # few and dear
            dearer, error_of_dearer = _median(self._in_full)
            more += self._full_share * (dearer - more)
            error = math.hypot((1 - self._full_share) * error, self._full_share * error_of_dearer)
        less, error_of_less = _median(self._alike) if len(self._alike) >= _ENOUGH else (1.0, 0.0)
        doubt = _CERTAIN * math.hypot(error, error_of_less)
        return Share(*(max(0.0, more - less + off) / every for off in (0.0, -doubt, doubt)))


def _median(values: Collection[float]) -> tuple[float, float]:
    """The median and its standard error."""
    middle = median(values)
    deviation = median(abs(value - middle) for value in values)
    return middle, _DEVIATION * deviation / math.sqrt(len(values))
