from __future__ import annotations

import math

import numpy as np
import pytest

from entropy_monitor.dashboards.colour_scale import SHARES, ColourScale, Decades


def test_shares_are_themselves() -> None:
    values = np.array([0.0, 0.25, 1.0, math.nan, math.inf])
    np.testing.assert_array_equal(SHARES.shares(values), values)
    assert SHARES.ticks == ((0.0, "0"), (1.0, "1"))


def test_each_decade_takes_the_same_share() -> None:
    scale = ColourScale(0.1, 1000.0, log=True)
    shares = scale.shares(np.array([0.1, 1.0, 10.0, 1000.0, 1e9]))
    np.testing.assert_allclose(shares[:4], [0, 0.25, 0.5, 1], atol=1e-12)
    assert shares[4] > 1
    assert [text for _, text in scale.ticks] == ["0.1", "1", "10", "100", "1000"]
    assert [place for place, _ in scale.ticks] == [0, 0.25, 0.5, 0.75, 1]


def test_what_has_no_logarithm_is_dark_and_what_is_not_finite_stays() -> None:
    scale = ColourScale(1.0, 100.0, log=True)
    shares = scale.shares(np.array([-5.0, 0.0, math.nan, math.inf]))
    np.testing.assert_array_equal(shares, [0, 0, math.nan, math.inf])


def test_decades_only_ever_grow() -> None:
    decades = Decades()
    ends = [
        (scale.low, scale.high)
        for scale in (decades.take(np.array(values)) for values in ([2.0, 30.0], [5.0], [0.2], [2000.0]))
    ]
    assert ends == [pytest.approx(e) for e in [(1, 100), (1, 100), (0.1, 100), (0.1, 10_000)]]


def test_decades_hold_what_they_are_told_to() -> None:
    scale = Decades(1.0, 100.0).take(np.array([0.001, 3.0]))
    assert (scale.low, scale.high) == (1.0, 100.0)


@pytest.mark.parametrize("values", [[math.nan], [-1.0], [], [10.0], [math.inf]])
def test_a_scale_has_always_a_low_and_a_high_end(values: list[float]) -> None:
    scale = Decades().take(np.array(values))
    assert scale.low < scale.high


def test_tiny_figures_do_not_make_the_others_alike() -> None:
    scale = Decades().take(np.array([1e-30, 5.0]))
    assert scale.low == pytest.approx(1e-5)
    assert [text for _, text in scale.ticks] == ["1e-5", "1e-4", "0.001", "0.01", "0.1", "1", "10"]
