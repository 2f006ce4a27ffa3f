from __future__ import annotations

import math

import pytest

from entropy_monitor import phrases


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.08, "0.08"), (2.7726, "2.77"), (212.4, "212"), (11273.0, "11,273"), (1.5e-5, "1.5e-05"),
     (2.5e7, "2.5e+07"), (-3.0, "-3"), (9.999, "10"), (99.96, "100"), (math.inf, "inf")],
)  # fmt: skip
def test_number(value: float, text: str) -> None:
    assert phrases.number(value) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.96, "96 %"), (0.034, "3.4 %"), (0.0996, "10 %"), (0.009, "0.9 %"), (0.0006, "< 0.1 %"), (0, "0 %")],
)
def test_percent(share: float, text: str) -> None:
    assert phrases.percent(share) == text


@pytest.mark.parametrize(
    ("which", "of", "text"),
    [((3,), 4, "head 3 of 4"), ((0, 1, 3), 4, "heads 0, 1 and 3 of 4"), ((0, 1, 2, 3), 4, "all 4 heads"),
     ((0,), 1, "head 0 of 1"), ((0, 1, 2, 5, 8, 9, 10, 11), 12, "heads 0–2, 5 and 8–11 of 12"),
     ((0, 1), 4, "heads 0 and 1 of 4")],
)  # fmt: skip
def test_heads(which: tuple[int, ...], of: int, text: str) -> None:
    assert phrases.heads(which, of) == text


@pytest.mark.parametrize(("ratio", "text"), [(12.44, "12.4×"), (1.0, "1.0×"), (1310.0, "1,310×")])
def test_times(ratio: float, text: str) -> None:
    assert phrases.times(ratio) == text


@pytest.mark.parametrize(
    ("numbers", "text"), [((), ""), ((3,), "3"), ((0, 1), "0 and 1"), ((0, 1, 2), "0–2")]
)
def test_ranges(numbers: tuple[int, ...], text: str) -> None:
    assert phrases.ranges(numbers) == text
