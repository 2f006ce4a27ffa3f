from __future__ import annotations

import json

import numpy as np
import pytest

from entropy_monitor.analyzer.latch import Latch


class SlowLatch:
    """The oracle: one slot, plain Python."""

    def __init__(self, on_after: int, off_after: int) -> None:
        self.on_after, self.off_after = on_after, off_after
        self.ill = self.well = 0
        self.on = False
        self.since: int | None = None

    def update(self, enter: bool, leave: bool, step: int) -> None:
        if enter and self.ill == 0 and not self.on:
            self.since = step
        self.ill = self.ill + 1 if enter else 0
        self.well = self.well + 1 if leave else 0
        if self.ill >= self.on_after:
            self.on = True
        if self.well >= self.off_after:
            self.on = False


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("on_after", "off_after"), [(1, 1), (2, 3), (4, 2)])
def test_equals_a_latch_per_slot_where_slots_come_and_go(seed: int, on_after: int, off_after: int) -> None:
    rng = np.random.default_rng(seed)
    slots = 7
    latch = Latch(on_after, off_after)
    slow = [SlowLatch(on_after, off_after) for _ in range(slots)]
    idle = 0
    for step in range(200):
        size = min(slots, 2 + step // 10)
        latch.grow(size)
        seen = rng.random(size) < 0.8
        # Long stretches without a sign of illness, so that the latch is idle in between.
        ill = 0.5 if step // 25 % 2 else 0.0
        sign = rng.choice(["ill", "well", "between"], size=size, p=[ill, 0.9 - ill, 0.1])
        latch.update(seen, seen & (sign == "ill"), seen & (sign == "well"), step)
        for slot in np.flatnonzero(seen):
            slow[slot].update(sign[slot] == "ill", sign[slot] == "well", step)
        idle += latch.idle
        assert latch.idle == (not any(one.on or one.ill for one in slow))
        assert latch.on.tolist() == [one.on for one in slow[:size]]
        since = [None if np.isnan(s) else int(s) for s in latch.since]
        assert since == [one.since for one in slow[:size]]
    assert 0 < idle < 200


def test_state_survives_strict_json() -> None:
    latch = Latch(2, 2)
    latch.grow(2)
    first, none = np.array([True, False]), np.zeros(2, dtype=bool)
    latch.update(first, first, none, step=5)
    restored = Latch(2, 2)
    restored.load_state_dict(json.loads(json.dumps(latch.state_dict(), allow_nan=False)))
    restored.update(first, first, none, step=6)
    assert restored.on.tolist() == [True, False]
    assert restored.since[0] == 5
