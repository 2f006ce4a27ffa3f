from __future__ import annotations

import numpy as np
import pytest

from entropy_monitor.analyzer.layer_groups import LayerGroups
from entropy_monitor.analyzer.slots import HeadIndex
from tests.analyzer.series import keys, record


def placed(heads: list[tuple[str, int, int]]) -> HeadIndex:
    index = HeadIndex()
    index.place(record(0, heads).heads)
    return index


@pytest.mark.parametrize("seed", range(5))
def test_equals_a_loop_over_slots(seed: int) -> None:
    rng = np.random.default_rng(seed)
    heads = [keys(4, 5, calls=2)[i] for i in rng.permutation(40)]
    index, groups = placed(heads), LayerGroups()
    for _ in range(20):
        on = rng.random(40) < rng.choice([0.02, 0.5])
        since = rng.integers(0, 100, 40).astype(float)
        expected: dict[str, list[int]] = {}
        for slot in np.flatnonzero(on).tolist():
            expected.setdefault(heads[slot][0], []).append(slot)
        found = groups.of(index, on)
        assert [group.layer for group in found] == [name for name in index.layers if name in expected]
        for group in found:
            slots = expected[group.layer]
            assert group.slots.tolist() == slots
            assert group.heads == tuple(sorted({heads[slot][2] for slot in slots}))
            assert group.of == 5
            assert index.layers[group.number] == group.layer
            assert group.first_step(since) == min(since[slots])


def test_what_stays_on_is_grouped_once() -> None:
    index, groups = placed(keys(2, 2)), LayerGroups()
    first = groups.of(index, np.array([True, False, False, True]))
    assert groups.of(index, np.array([True, False, False, True])) is first
    assert [group.heads for group in groups.of(index, np.array([True, True, False, False]))] == [(0, 1)]


def test_a_layer_that_grows_and_an_index_that_is_loaded_are_seen() -> None:
    index, groups = placed([("a", 0, 0), ("b", 0, 0)]), LayerGroups()
    on = np.array([True, False])
    assert [(group.layer, group.of) for group in groups.of(index, on)] == [("a", 1)]
    index.place(record(1, [("a", 0, 1)]).heads)
    assert [(group.layer, group.of) for group in groups.of(index, np.append(on, False))] == [("a", 2)]
    index.load_state_dict(placed([("c", 0, 0), ("b", 0, 0), ("a", 0, 0)]).state_dict())
    assert [group.layer for group in groups.of(index, np.append(on, False))] == ["c"]


def test_nothing_on() -> None:
    assert LayerGroups().of(HeadIndex(), np.empty(0, dtype=np.bool_)) == []
    assert LayerGroups().of(placed(keys(1, 2)), np.zeros(2, dtype=np.bool_)) == []
