from __future__ import annotations

import gc

import numpy as np
import pytest

from entropy_monitor.store.kept_arrays import KeptArray, KeptArrays


@pytest.fixture(autouse=True)
def little_room(monkeypatch):
    gc.collect()  # of what other tests left
    monkeypatch.setattr("entropy_monitor.store.kept_arrays._MOST_BYTES", 1000)


def rows(first, stop):
    return np.arange(first, stop, dtype=np.float32)[:, None] * np.ones(2, np.float32)


def test_an_array_grows_at_its_end():
    array, rng = KeptArray(), np.random.default_rng(0)
    expected = rows(0, 5)
    array.put(0, rows(0, 5))
    given = array.view()
    for _ in range(30):
        start = int(rng.integers(max(0, array.valid - 3), array.valid + 1))
        array.valid = start
        new = rows(100 + start, 100 + start + int(rng.integers(1, 9)))
        expected = np.concatenate([expected[:start], new])
        array.put(start, new)
        assert array.valid == len(expected)
        np.testing.assert_array_equal(array.view(), expected)
    assert len(given) == 5
    with pytest.raises(ValueError, match="read-only"):
        array.view()[0, 0] = 1
    assert array.nbytes < 8 * 1.3 * 8 * 40


def test_what_was_not_used_longest_goes_first_in_all_collections():
    one, two = KeptArrays(), KeptArrays()
    for owner, name in ((one, "a"), (two, "b"), (one, "c"), (two, "d")):
        owner.of(name).put(0, rows(0, 30))  # 240 bytes
    one.make_room()
    assert all(owner.of(name).valid for owner, name in ((one, "a"), (two, "b"), (one, "c"), (two, "d")))
    kept = one.of("c")
    one.of("e").put(0, rows(0, 30))
    one.make_room()
    assert [two.of(name).valid for name in "bd"] == [0, 30]
    assert [one.of(name).valid for name in "ace"] == [30, 30, 30]
    assert len(kept.view()) == 30


def test_the_array_that_is_asked_for_stays_even_if_there_is_no_room_for_it():
    one, two = KeptArrays(), KeptArrays()
    two.of("b").put(0, rows(0, 3))
    one.of("a").put(0, rows(0, 3))
    one.of("large").put(0, rows(0, 500))
    one.make_room()
    assert (two.of("b").valid, one.of("a").valid, one.of("large").valid) == (0, 0, 500)


def test_cut_and_clear():
    one = KeptArrays()
    one.of("a").put(0, rows(0, 9))
    one.of("b").put(0, rows(0, 4))
    one.cut(6)
    assert (one.of("a").valid, one.of("b").valid) == (6, 4)
    one.clear()
    assert one.of("a").valid == 0


def test_a_collection_that_is_gone_takes_no_room():
    one = KeptArrays()
    one.of("a").put(0, rows(0, 100))
    del one
    gc.collect()
    two = KeptArrays()
    two.of("b").put(0, rows(0, 60))
    two.of("c").put(0, rows(0, 60))
    two.make_room()
    assert (two.of("b").valid, two.of("c").valid) == (60, 60)
