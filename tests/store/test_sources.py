from __future__ import annotations

import numpy as np
import pytest

from entropy_monitor.store.held_records import HeldRecords
from entropy_monitor.store.sources import Part, _within, first_change


def held(*steps):
    n = np.arange(len(steps))
    return HeldRecords(np.array(steps, np.int64), n, n * 4, np.full_like(n, 4), np.zeros_like(n))


@pytest.mark.parametrize(
    ("old", "new", "first"),
    [
        ((), (), None),
        ((), (5,), 5),
        ((1, 2), (1, 2), None),
        ((1, 2), (1, 2, 3), 3),
        ((1, 2, 3), (1, 2), 3),
        ((1, 2), (1, 2, 0), 0),
        ((1, 2, 3), (1, 9, 3), 2),
        ((10, 20, 30), (10, 30), 20),
        ((10, 64, 5), (10, 64, 80), 5),
    ],
)
def test_the_first_change(old, new, first):
    parts = [[Part(None, None, held(1, 2)), Part(None, None, held(*steps))] for steps in (old, new)]
    assert first_change(*parts) == first


def test_records_of_equal_steps_may_differ_in_their_rows():
    one, two = held(1, 2, 3), held(1, 2, 3)
    two.rows[1] = 5
    assert one.common_start(two) == 1
    assert one.common_start(held(1, 2)) == 2
    assert HeldRecords.none().common_start(one) == 0


@pytest.mark.parametrize("seed", range(5))
def test_which_steps_blocks_cover(seed):
    g = np.random.default_rng(seed)
    begins = g.integers(-20, 80, 6)
    ends = begins + g.integers(0, 15, 6)
    steps = g.integers(-30, 110, 50)
    expected = [any(b <= step <= e for b, e in zip(begins, ends, strict=True)) for step in steps]
    assert _within(steps, begins, ends).tolist() == expected
    assert not _within(steps, begins[:0], ends[:0]).any()
