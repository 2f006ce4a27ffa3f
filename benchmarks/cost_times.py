"""How long steps take that are watched, beside plain ones of the same kind and the same round."""

from __future__ import annotations

import gc
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import torch
from cost_contenders import AGAIN, BASE
from cost_plain import Plain
from models import Clock, timed

from entropy_monitor.schedule import IN_FULL

EVERY = 10  # of the default run: one measured step, the others between
_RESAMPLED = 2000
_MOST_TURNS = 100  # to wait for a step that is read in full; one of four is


@dataclass
class Ratios:
    """To the plain step of the same kind and round.

    Attributes:
        alone: of measured steps, where they can read rows alone; else of all measured steps.
        in_full: of those that read weights, gradients and updates too.
        between: of steps that are not measured; of two in each round, together.
    """

    alone: list[float] = field(default_factory=list)
    in_full: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)

    def default_run(self) -> str:
        """A step of a run that measures one of ten, and where it lies with 95 % (bootstrap), as text."""
        generator = np.random.default_rng(0)

        def drawn(values: list[float]) -> np.ndarray:
            """Medians: of the values themselves, then of others that might have been found instead."""
            places = generator.integers(len(values), size=(_RESAMPLED, len(values)))
            return np.r_[median(values), np.median(np.array(values)[places], axis=1)]

        measured = drawn(self.alone)
        if self.in_full:
            measured = (drawn(self.in_full) + (IN_FULL - 1) * measured) / IN_FULL
        found = (measured + (EVERY - 1) * drawn(self.between)) / EVERY
        low, high = np.quantile(found[1:], (0.025, 0.975))
        return f"{found[0]:.3f} ({low:.3f} … {high:.3f})"


def quartiles(values: list[float]) -> str:
    """Median, quartiles and how many there are, as text; a dash for none."""
    if not values:
        return "–"
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return f"{middle:.3f} ({low:.3f} … {high:.3f}; {len(values)})"


def ratios(contenders: Mapping[str, Plain], rounds: int, clock: Clock) -> dict[str, Ratios]:
    """Time them all, in every round in an order that is drawn anew.

    Half of the rounds time a step in full of those that have such steps, half one that reads rows alone. What
    a place in the round or in a visit costs meets the plain steps alike.
    """
    draw = random.Random(0)
    found = {name: Ratios() for name in contenders}
    for i in range(rounds + rounds % 2):
        in_full = i % 2 == 1
        order = draw.sample(list(contenders), len(contenders))
        took = {name: _visit(contenders[name], in_full, clock) for name in order}
        for name, (measured, between) in took.items():
            # The plain ones measure nothing; theirs is the noise of either column.
            split = contenders[name].in_full is not None or name in (BASE, AGAIN)
            kind = found[name].in_full if in_full and split else found[name].alone
            kind.append(measured / took[BASE][0])
            found[name].between.append(between / took[BASE][1])
    return found


def _visit(contender: Plain, in_full: bool, clock: Clock) -> tuple[float, float]:
    """Seconds of a measured step, and of two between: one before it and one after.

    A measured step comes first that is not timed, so that all that are find the caches warm.
    """
    gc.collect()
    for _ in range(_MOST_TURNS):
        _step(contender, True)
        before = timed(lambda: _step(contender, False), clock)
        if contender.in_full in (None, in_full):
            break
    else:
        raise RuntimeError(f"none of {_MOST_TURNS} measured steps had in_full={in_full}")
    measured = timed(lambda: _step(contender, True), clock)
    return measured, before + timed(lambda: _step(contender, False), clock)


def _step(contender: Plain, measured: bool) -> None:
    contender.measured() if measured else contender.between()
    if contender.setting.device == "cuda":
        torch.cuda.synchronize()
