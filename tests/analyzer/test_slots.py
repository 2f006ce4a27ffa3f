from __future__ import annotations

from typing import Any

import numpy as np

from entropy_monitor.analyzer.slots import HeadIndex, SlotArrays
from entropy_monitor.records import HEADS
from tests.analyzer.series import keys, record


def test_a_head_keeps_its_slot_whatever_the_order() -> None:
    index = HeadIndex()
    first = index.place(record(0, keys(2, 3)).heads)
    backwards = index.place(record(1, keys(2, 3)[::-1]).heads)
    assert first.tolist() == list(range(6))
    assert backwards.tolist() == list(range(6))[::-1]
    assert len(index) == 6


def test_heads_that_appear_get_new_slots_and_return_to_them() -> None:
    index = HeadIndex()
    index.place(record(0, [("a", 0, 0)]).heads)
    assert index.place(record(1, [("b", 0, 0), ("a", 1, 0), ("a", 0, 0)]).heads).tolist() == [1, 2, 0]
    assert index.place(record(2, [("a", 1, 0)]).heads).tolist() == [2]
    assert index.layers == ["a", "b"]
    assert index.layer.tolist() == [0, 1, 0]
    assert [slots.tolist() for slots in index.slots_of] == [[0, 2], [1]]
    assert index.heads_in == [1, 1]


def test_the_mapping_is_kept_while_the_keys_are_equal() -> None:
    index = HeadIndex()
    first = index.place(record(0, keys(2, 2)).heads)
    assert index.place(record(1, keys(2, 2)).heads) is first
    assert index.place(record(2, keys(2, 1)).heads) is not first


def test_a_buffer_written_over_is_not_mistaken_for_the_same_keys() -> None:
    index = HeadIndex()
    columns: Any = record(0, [("a", 0, 0), ("a", 0, 1)]).heads
    index.place(columns)
    columns["head"][:] = [1, 0]
    assert index.place(columns).tolist() == [1, 0]


def test_knows_whether_rows_are_all_slots_in_their_order() -> None:
    index, told = HeadIndex(), []
    for heads in (
        keys(2, 2),
        keys(2, 2),
        keys(2, 1),
        keys(2, 2)[::-1],
        [*keys(2, 2), ("late", 0, 0)],
        keys(2, 2),
    ):
        index.place(record(0, heads).heads)
        told.append(index.in_order)
    assert told == [True, True, False, False, True, False]


def test_no_rows() -> None:
    index = HeadIndex()
    assert index.place(HEADS.empty()).tolist() == []
    assert index.place({}).tolist() == []


def test_state_gives_the_same_slots() -> None:
    index = HeadIndex()
    index.place(record(0, [("b", 0, 1), ("a", 0, 0), ("b", 0, 0)]).heads)
    restored = HeadIndex()
    restored.place(record(0, keys(3, 3)).heads)
    restored.load_state_dict(index.state_dict())
    assert restored.place(record(1, [("b", 0, 0), ("c", 0, 0)]).heads).tolist() == [2, 3]
    assert restored.layers == ["b", "a", "c"]


def test_arrays_grow_with_their_fill_and_keep_nan_as_none() -> None:
    arrays = SlotArrays(first=float("nan"), count=0.0)
    arrays.grow(2)
    arrays["count"][1] = 3
    arrays.grow(3)
    assert arrays["count"].tolist() == [0, 3, 0]
    assert arrays.state_dict() == {"first": [None] * 3, "count": [0, 3, 0]}
    restored = SlotArrays(first=0.0, count=0.0)
    restored.load_state_dict(arrays.state_dict())
    assert np.isnan(restored["first"]).all()
