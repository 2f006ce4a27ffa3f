"""The one place that keeps the monitor's own faults away from the training it watches."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger("entropy_monitor")


class Guard:
    """Runs parts of the monitor; what raises is logged once, counted, and after a while switched off.

    Args:
        strict: let errors through (outside training: `measure`, `capture`, construction).
        patience: failures after which a part is not tried any more.

    Attributes:
        faults: how often each part failed.
    """

    def __init__(self, strict: bool = False, patience: int = 3) -> None:
        self.strict = strict
        self.faults: Counter[str] = Counter()
        self._patience = patience

    def is_off(self, part: str) -> bool:
        """Whether a part failed so often that it is not tried any more."""
        return self.faults[part] >= self._patience

    def run(self, part: str, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R | None:
        """`call(*args, **kwargs)`, or None where it raised or its part is switched off."""
        if self.is_off(part):
            return None
        try:
            return call(*args, **kwargs)
        except Exception as error:  # nothing of ours may reach the training loop
            if self.strict:
                raise
            self._note(part, error)
            return None

    def _note(self, part: str, error: Exception) -> None:
        self.faults[part] += 1
        if self.faults[part] == 1:
            logger.warning(
                "entropy-monitor: %s failed; training goes on without it. It is switched off %s. %s: %s",
                part,
                "now" if self._patience == 1 else f"after {self._patience} failures",
                type(error).__name__,
                error,
                exc_info=error,
            )
