from __future__ import annotations

import pytest

from entropy_monitor.dashboards.cadence import Cadence
from entropy_monitor.errors import ConfigurationError


def drawn(every: int, records: int) -> list[int]:
    cadence = Cadence(every, "heatmap_every")
    return [n for n in range(records) if cadence.due()]


def test_draws_the_first_then_every_nth_then_ever_fewer() -> None:
    assert drawn(2, 30) == [0, 2, 4, 6, 8, 10, 12, 15, 18, 22, 27]


def test_grows_with_the_logarithm_of_the_run() -> None:
    assert len(drawn(10, 1_000_000)) == 50


def test_zero_draws_nothing() -> None:
    assert drawn(0, 100) == []


@pytest.mark.parametrize("every", [-1, 1.5, True, None])
def test_refuses_what_is_no_count(every: object) -> None:
    with pytest.raises(ConfigurationError, match=r"heatmap_every is .*; give a whole number of records"):
        Cadence(every, "heatmap_every")  # type: ignore[arg-type]
