from __future__ import annotations

import warnings
from itertools import pairwise

import numpy as np
import pytest

from entropy_monitor.precision import Precision


def observed(entropy: np.ndarray, error: np.ndarray, precision: Precision | None = None) -> Precision:
    precision = Precision() if precision is None else precision
    for e, s in zip(entropy, error, strict=True):
        precision.observe("heads", e, s)
    return precision


def readings(spread: float, error: float, heads: int = 200, steps: int = 33) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    true = 2 + spread * draw.standard_normal((steps, heads))
    return true + error * draw.standard_normal((steps, heads)), np.full((steps, heads), error)


def naive_excess(entropy: np.ndarray, error: np.ndarray) -> float:
    found = []
    for values, errors in zip(entropy.T, error.T, strict=True):
        squares = [(b - a) ** 2 / 2 for a, b in pairwise(values)]
        error2 = sum(s**2 for s in errors[1:]) / len(squares)
        spread2 = max(sum(squares) / len(squares) - error2, 0.0)
        found.append(error2 / max(spread2 / 9, 0.005**2))
    return float(np.median(found))


@pytest.mark.parametrize("steps", [9, 20, 33])
def test_excess_against_the_formula(steps: int) -> None:
    figures = readings(0.1, 0.05, heads=5, steps=steps)
    assert observed(*figures).excess == pytest.approx(naive_excess(*figures))


@pytest.mark.parametrize(
    ("spread", "error", "expected"), [(0.3, 0.1, 1.0), (0.3, 0.05, 0.25), (0.1, 0.1, 9.0)]
)
def test_is_the_squared_ratio_to_a_third_of_the_spread(spread: float, error: float, expected: float) -> None:
    assert observed(*readings(spread, error, heads=2000)).excess == pytest.approx(expected, rel=0.2)


def test_errors_that_nobody_would_notice_are_tolerated_however_still_the_entropies_are() -> None:
    excess = observed(*readings(0.0, 0.002)).excess
    assert excess is not None
    assert excess < 0.3


def test_is_not_known_before_there_are_enough_readings() -> None:
    entropy, error = readings(0.1, 0.05)
    assert Precision().excess is None
    assert observed(entropy[:8], error[:8]).excess is None
    assert observed(entropy[:9], error[:9]).excess is not None


def test_other_heads_begin_anew() -> None:
    precision = observed(*readings(0.1, 0.05))
    precision.observe("others", np.ones(3), np.ones(3))
    assert precision.excess is None


def test_what_is_not_finite_is_left_out() -> None:
    entropy, error = readings(0.1, 0.05)
    expected = naive_excess(entropy[:, 3:], error[:, 3:])
    entropy[:, 0], error[:, 1], entropy[:, 2] = np.nan, np.nan, np.inf
    entropy[5:7, 3] = np.nan  # for a while
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert observed(entropy, error).excess == pytest.approx(expected, rel=0.05)
        assert observed(entropy * np.nan, error).excess is None


def test_half_the_rows_have_errors_that_are_greater_by_the_root_of_two() -> None:
    precision = observed(*readings(0.1, 0.05))
    assert precision.excess is not None
    assert precision.excess_with_half == pytest.approx(2 * precision.excess)


def test_once_all_rows_are_read_the_errors_before_say_what_fewer_would_bring() -> None:
    precision = observed(*readings(0.1, 0.1))
    before = precision.excess
    precision.forget(2)
    assert precision.excess is precision.excess_with_half is None
    exact = readings(0.1, 0.0)
    observed(*exact, precision)
    assert before is not None
    assert precision.excess == 0.0
    assert precision.excess_with_half == pytest.approx(before, rel=0.3)
    assert observed(*exact).excess_with_half == 0.0  # nothing was before
    observed(*readings(1.0, 0.0), precision)
    assert precision.excess_with_half == pytest.approx(before / 50, rel=1)
