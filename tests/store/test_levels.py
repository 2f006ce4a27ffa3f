from __future__ import annotations

import numpy as np
import pytest

from entropy_monitor.records import ABOVE_FLOOR, HEADS, LEVELLED, LEVELS, SHARE
from entropy_monitor.store import FollowedRun, RunWriter
from entropy_monitor.store.codec import to_batch
from entropy_monitor.store.levels import BLOCK, Levels, derived
from tests.store.naive_blocks import places, shown
from tests.store.random_runs import Shape, record
from tests.store.samples import info


def records(count, start=0, seed=0, **shape):
    g = np.random.default_rng(seed)
    return [record(g, step, Shape(changing=0, **shape)) for step in range(start, start + count)]


def gathered(several):
    """The blocks that these records give, and after how many of them."""
    levels = Levels()
    made = [(number, levels.add(each.heads)) for number, each in enumerate(several, 1)]
    return [(number, block) for number, block in made if block is not None]


@pytest.mark.parametrize("seed", range(2))
def test_a_block_holds_mean_least_and_largest_of_what_is_finite(seed):
    several = records(BLOCK, start=-5, seed=seed, calls=2, broken=0.3)
    ((number, block),) = gathered(several)
    assert number == BLOCK
    assert list(block) == list(LEVELS.names)
    to_batch(LEVELS, block)  # its types are those of the table
    (of_step,) = shown(several, [several]).values()
    for row, place in enumerate(places(several[0])):
        for name in LEVELLED:
            for end, expected in zip(("", "_low", "_high"), of_step[place][name], strict=True):
                np.testing.assert_allclose(block[name + end][row], expected, rtol=1e-6, atol=1e-6)
        assert block["broken"][row] == of_step[place]["broken"][0]
        assert block["rows_read"][row] == sum(int(each.heads["rows_read"][row]) for each in several)
        assert (block["layer"][row], block["call"][row], block["head"][row]) == (
            place.layer,
            place.call,
            place.head,
        )
    for name, value in (("step", -5), ("until", BLOCK - 6), ("measured", BLOCK)):
        assert set(np.asarray(block[name])) == {value}


def test_what_was_never_known_is_null():
    several = records(BLOCK, broken=0)
    for each in several:
        each.heads["floor_paper"][:] = np.nan
        each.heads["entropy"][0] = np.inf
    ((_, block),) = gathered(several)
    for end in ("", "_low", "_high"):
        assert np.isnan(block["floor_paper" + end]).all()
        assert np.isnan(block["entropy" + end][0])
    assert block["broken"].tolist() == [BLOCK, 0, 0, 0, 0, 0]


def test_blocks_follow_each_other_and_the_last_one_waits():
    found = gathered(records(3 * BLOCK - 1))
    assert [(number, int(block["step"][0])) for number, block in found] == [(BLOCK, 0), (2 * BLOCK, BLOCK)]


@pytest.mark.parametrize("change", ["layer", "call", "head", "layer_index", "a row less", "order"])
def test_other_heads_begin_another_block(change):
    several = records(2 * BLOCK + 3)
    for each in several[5:]:
        heads = each.heads
        if change == "a row less":
            heads.update({name: values[:-1] for name, values in heads.items()})
        elif change == "order":
            heads.update({name: values[::-1] for name, values in heads.items()})
        elif change == "layer":
            heads["layer"] = [*heads["layer"][:-1], "other"]
        else:
            heads[change] = heads[change] + np.array([0, 0, 0, 0, 0, 1])
    assert [int(block["step"][0]) for _, block in gathered(several)] == [5]


def test_steps_that_do_not_rise_begin_another_block():
    several = [*records(10), *records(2, start=9), *records(BLOCK, start=4)]
    assert [(n, int(b["step"][0])) for n, b in gathered(several)] == [(12 + BLOCK, 4)]


def test_a_record_without_heads_is_passed_over():
    several = records(BLOCK)
    levels = Levels()
    found = [levels.add(heads) for each in several for heads in (HEADS.empty(), each.heads)]
    assert [block is not None for block in found].count(True) == 1


def test_the_callers_arrays_may_be_used_again():
    several = records(BLOCK)
    ((_, expected),) = gathered(several)
    levels, buffers = Levels(), {}
    for each in several:
        for name, values in each.heads.items():
            if isinstance(values, list):
                buffers.setdefault(name, []).clear()
                buffers[name].extend(values)
            else:
                buffers.setdefault(name, np.empty_like(values))[:] = values
        block = levels.add(buffers)
    for name in LEVELS.names:
        np.testing.assert_array_equal(block[name], expected[name])


def test_other_number_types_and_texts_do():
    several = records(BLOCK, broken=0)
    ((_, expected),) = gathered(several)
    for each in several:
        heads = each.heads
        heads["rows_read"] = heads["rows_read"].astype(np.uint64)
        heads["entropy"] = heads["entropy"].astype(np.float64)
        heads["layer"] = np.array(heads["layer"])
        heads["head"] = heads["head"].tolist()
    ((_, block),) = gathered(several)
    for name in LEVELS.names:
        np.testing.assert_array_equal(block[name], expected[name])


def test_derived_figures():
    heads = HEADS.empty() | {
        "entropy": np.array([1, 2, np.nan, 3], np.float32),
        "max_entropy": np.array([2, 0, 2, np.nan], np.float32),
        "floor_row": np.array([0.25, np.nan, 1, 1], np.float32),
    }
    np.testing.assert_array_equal(derived(heads, SHARE), [0.5, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(derived(heads, ABOVE_FLOOR), [0.75, np.nan, np.nan, 2])


def test_blocks_take_a_small_part_of_the_runs_size(tmp_path):
    """What `entropy_monitor.store` says of their size."""
    writer = RunWriter(tmp_path, flush_seconds=1e9)
    writer.open(info())
    for each in records(16 * BLOCK, layers=5, heads=12, broken=0):
        writer.log(each)
    writer.close()
    sizes = {path.name.split("-")[0]: path.stat().st_size for path in tmp_path.glob("*.arrows")}
    assert 0.02 < sizes["levels"] / sizes["heads"] < 0.1


def test_a_record_that_cannot_be_summed_up_is_not_kept_in_part(tmp_path, monkeypatch):
    writer = RunWriter(tmp_path)
    writer.open(info())
    good, bad = records(2)
    writer.log(good)
    with monkeypatch.context() as patch:
        patch.setattr(Levels, "add", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            writer.log(bad)
    writer.close()
    assert FollowedRun(tmp_path).heads.steps.tolist() == [0]


def test_what_was_not_written_is_made_up_for_by_records(tmp_path):
    """Blocks are written several at a time; a process that ends before has lost nothing."""
    writer = RunWriter(tmp_path, flush_every=1)
    writer.open(info())
    for each in records(3 * BLOCK):
        writer.log(each)
    run = FollowedRun(tmp_path, most_cells=10**3)
    assert not run.heads.in_blocks
    assert run.heads.steps.tolist() == list(range(3 * BLOCK))
    writer.close()
    run.refresh()
    assert run.heads.steps.tolist() == [0, BLOCK, 2 * BLOCK]
