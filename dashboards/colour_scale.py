"""Which figure has which colour: shares from 0 to 1, and decades that widen as a run grows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

_MOST_DECADES = 6


@dataclass(frozen=True)
class ColourScale:
    """Figures from `low` to `high`, evenly, or by their logarithm.

    Attributes:
        low: drawn in the darkest colour, as all below it.
        high: drawn in the lightest colour, as all above it.
        log: whether each decade takes the same share; then both are powers of ten.
    """

    low: float
    high: float
    log: bool = False

    def shares(self, values: FloatArray) -> FloatArray:
        """Where figures lie, 0 … 1 from low to high; NaN and infinities stay. Any shape."""
        if not self.log:
            return (values - self.low) / (self.high - self.low)
        with np.errstate(divide="ignore", invalid="ignore"):
            decade = np.log10(np.where(np.isfinite(values), np.maximum(values, self.low), values))
        return (decade - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))

    @property
    def ticks(self) -> tuple[tuple[float, str], ...]:
        """Places on the scale, 0 … 1, and the figures there: its ends, or every decade."""
        if not self.log:
            return (0.0, f"{self.low:g}"), (1.0, f"{self.high:g}")
        first, last = round(math.log10(self.low)), round(math.log10(self.high))
        return tuple(((decade - first) / (last - first), _power(decade)) for decade in range(first, last + 1))


SHARES = ColourScale(0.0, 1.0)


class Decades:
    """A logarithmic scale of whole decades, which only ever grows, so that pictures of a run compare.

    Args:
        low: where it begins at least, a power of ten; by default what is seen says.
        high: where it ends at least.
    """

    def __init__(self, low: float | None = None, high: float | None = None) -> None:
        self._low = None if low is None else round(math.log10(low))
        self._high = None if high is None else round(math.log10(high))
        self._given_low = low is not None

    def take(self, values: FloatArray) -> ColourScale:
        """The scale after these figures; what is not finite or not positive does not count."""
        seen = values[np.isfinite(values) & (values > 0)]
        if len(seen):
            least, most = math.floor(math.log10(seen.min())), math.ceil(math.log10(seen.max()))
            self._high = most if self._high is None else max(self._high, most)
            if not self._given_low:
                self._low = least if self._low is None else min(self._low, least)
        high = 0 if self._high is None else self._high
        low = high - 1 if self._low is None else self._low
        low = min(max(low, high - _MOST_DECADES), high - 1)
        return ColourScale(10.0**low, 10.0**high, log=True)


def _power(decade: int) -> str:
    return f"{10.0**decade:.{max(0, -decade)}f}" if -3 <= decade <= 4 else f"1e{decade}"
