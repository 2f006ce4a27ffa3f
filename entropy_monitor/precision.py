"""How precise the entropies are, beside how much they differ from batch to batch."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from entropy_monitor.records import Array

TOLERANCE = 1 / 3
"""Standard errors that are this share of the batch-to-batch spread add 5 % to it."""

_NEGLIGIBLE = 0.02  # nats: standard errors that no detector would notice, however still the entropies are
_ENOUGH = 8  # differences, before anything is said
_MEMORY = 32  # differences that the means go back


class Precision:
    """Compares each head's standard error with the spread of its entropy between measured steps.

    Successive readings differ by what batches differ and by the errors of both: half the mean square of the
    differences, less the mean square of the standard errors, is the square of the spread. A drift counts as
    spread: what is fast needs less precision.
    """

    def __init__(self) -> None:
        self._entropy: Array
        self._squares: Array  # half the squared differences, mean
        self._errors: Array  # squared standard errors, mean
        self._known: Array
        self._count: int
        self._foretold: Array | None = None  # squared errors with this number of rows, by those before
        self._heads: Hashable = None
        self._begin(np.empty(0))

    def forget(self, growth: float) -> None:
        """Begin anew, with so many times the rows."""
        self._foretold = self._likely_errors / growth
        self._heads = None
        self._begin(np.empty(0))

    def observe(self, heads: Hashable, entropy: Array, error: Array) -> None:
        """Take a measured step.

        Args:
            heads: what the figures belong to; means begin anew when it changes.
            entropy: `[heads]`, nats.
            error: `[heads]`, its standard errors, nats.
        """
        if heads != self._heads:
            self._heads = heads
            self._begin(entropy)
            return
        self._count += 1
        weight = 1 / min(self._count, _MEMORY)
        with np.errstate(invalid="ignore", over="ignore"):
            squares = (entropy - self._entropy) ** 2 / 2
        known = np.isfinite(squares) & np.isfinite(error)  # the others keep what they had
        self._squares[known] += weight * (squares - self._squares)[known]
        self._errors[known] += weight * (error**2 - self._errors)[known]
        self._known |= known
        self._entropy = entropy

    @property
    def excess(self) -> float | None:
        """`(standard error / tolerated one)²` of the median head; None: not known."""
        return self._excess(self._errors)

    @property
    def excess_with_half(self) -> float | None:
        """The same as it would be with half the rows; squared errors are inversely proportional to them.

        Where all rows are read, and nothing is uncertain, the errors before say what fewer would bring.
        """
        return self._excess(2 * self._likely_errors)

    @property
    def _likely_errors(self) -> Array:
        return self._errors if self._foretold is None or self._errors.any() else self._foretold

    def _excess(self, errors: Array) -> float | None:
        if self._count < _ENOUGH or not self._known.any() or errors.shape != self._errors.shape:
            return None
        spread = np.maximum(self._squares - self._errors, 0.0)
        excess = errors / np.maximum(TOLERANCE**2 * spread, _NEGLIGIBLE**2)
        return float(np.median(excess[self._known]))

    def _begin(self, entropy: Array) -> None:
        self._entropy = entropy
        self._squares = np.zeros(len(entropy))
        self._errors = np.zeros(len(entropy))
        self._known = np.zeros(len(entropy), bool)
        self._count = 0
