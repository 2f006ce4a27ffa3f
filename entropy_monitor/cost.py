"""How much of the training's time the measuring takes."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

_WARM_UP = 3  # measured steps that may compile, allocate and tune
_PLAIN = 32  # latest unmeasured steps: what a step takes now
_KEPT = 32  # of each kind of measured steps
_ENOUGH = 4  # of each kind, for a mean and its error
_CERTAIN = 2.0  # standard errors
_TRIMMED = 0.25  # at either end: evaluations, checkpoints, stalls


class Share(NamedTuple):
    """A share of the training's time: the most likely one, and the bounds that noise leaves possible."""

    likely: float
    least: float
    most: float


class Cost:
    """How much longer steps take that are measured, from the end of one to the end of the next.

    Each measured step is taken relative to the unmeasured ones shortly before, so that a training that
    becomes slower or faster does not matter. What training itself does now and then is in both, as long as
    the measured steps keep no time with it; trimmed means leave out most of it.

    Args:
        full_share: of the measured steps, in the long run, that are read in full.
        clock: seconds, monotonic.
    """

    def __init__(self, full_share: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._full_share = full_share
        self._clock = clock
        self._time: float | None = None
        self._warm_up = _WARM_UP
        self._plain: deque[float] = deque(maxlen=_PLAIN)
        # Relative to plain steps; without and with what is read in full.
        self._rows: deque[float] = deque(maxlen=_KEPT)
        self._full: deque[float] = deque(maxlen=_KEPT)
        self._beside_rows: tuple[float, float] | None = None  # what is read in full adds, and its error

    def end(self, measured: bool, in_full: bool = False) -> None:
        """Note that a step ended now.

        Args:
            measured: whether it was measured.
            in_full: whether weights, gradients and updates were read too.
        """
        before, self._time = self._time, self._clock()
        if self._warm_up:
            self._warm_up -= measured
        elif before is not None:
            seconds = self._time - before
            if not measured:
                self._plain.append(seconds)
            elif len(self._plain) >= 2 * _ENOUGH and (usual := _mean(self._plain)[0]) > 0:
                (self._full if in_full else self._rows).append(seconds / usual)

    def other_rows(self) -> None:
        """Rows will cost something else from now on; the rest will not."""
        if len(self._rows) >= _ENOUGH and len(self._full) >= _ENOUGH:
            (rows, error), (full, error_of_full) = _mean(self._rows), _mean(self._full)
            self._beside_rows = full - rows, math.hypot(error, error_of_full)
        self._rows.clear()
        self._full.clear()

    def share(self, every: int) -> Share | None:
        """What measuring one step in `every` adds to a training without, relative to it; None: not known.

        As long as steps with rows alone are not known, it is at least what the others add by themselves.
        """
        full = _mean(self._full) if len(self._full) >= _ENOUGH else None
        if len(self._rows) < _ENOUGH:
            if full is None:
                return None
            more, error = self._full_share * (full[0] - 1), self._full_share * full[1]
            likely, least = max(0.0, more), max(0.0, more - _CERTAIN * error)
            return Share(likely / every, least / every, math.inf)
        rows, error = _mean(self._rows)
        if full is not None:
            beside, error_beside = full[0] - rows, math.hypot(full[1], error)
        elif self._beside_rows is not None:
            beside, error_beside = self._beside_rows
        else:
            return None
        more = rows - 1 + self._full_share * beside
        doubt = _CERTAIN * math.hypot(error, self._full_share * error_beside)
        return Share(*(max(0.0, more + off) / every for off in (0.0, -doubt, doubt)))

    def state_dict(self) -> dict[str, Any]:
        """What measured steps took; JSON-able."""
        return {"rows": list(self._rows), "full": list(self._full), "beside_rows": self._beside_rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, with a new warm-up."""
        self._rows.extend(state["rows"])
        self._full.extend(state["full"])
        beside = state["beside_rows"]
        self._beside_rows = None if beside is None else (beside[0], beside[1])
        self._time = None


def _mean(values: Collection[float]) -> tuple[float, float]:
    """The mean without both ends, and its standard error (Tukey and McLaughlin 1963)."""
    x = np.sort(np.fromiter(values, float))
    cut = int(_TRIMMED * len(x))
    inner = x[cut : len(x) - cut]
    winsorized = np.clip(x, inner[0], inner[-1])
    kept = len(inner) / len(x)
    return float(inner.mean()), float(winsorized.std(ddof=1) / (kept * math.sqrt(len(x))))
