from __future__ import annotations

from itertools import count

import numpy as np
import pytest

from entropy_monitor.records import ABOVE_FLOOR, HEADS, LAYERS, LEVELLED, SHARE, Record
from entropy_monitor.store import FollowedRun, RunWriter, read_run
from entropy_monitor.store.batches import Batches
from entropy_monitor.store.cubes import Cubes
from tests.store.naive_blocks import blocks_of, shown
from tests.store.naive_cubes import NaiveCubes, assert_cubes, assert_followed, figures
from tests.store.random_runs import Shape, record, write
from tests.store.samples import info

BLOCK = 8
ENDS = ("mean", "low", "high")


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    monkeypatch.setattr("entropy_monitor.store.levels.BLOCK", BLOCK)
    monkeypatch.setattr("entropy_monitor.store.appending._BLOCKS_AT_ONCE", 2)


def write_records(run_dir, records, rank=0, flush_every=3):
    """One session of these; yields after each record, and once more when it is ended."""
    writer = RunWriter(run_dir, rank=rank, flush_every=flush_every, flush_seconds=1e9)
    writer.open(info())
    for each in records:
        writer.log(each)
        yield
    writer.close()
    yield


def random_records(seed, steps, changing=0.02, broken=0.1, **shape):
    g = np.random.default_rng(seed)
    return [record(g, step, Shape(changing=changing, broken=broken, **shape)) for step in steps]


def in_blocks(run_dir):
    """The run with just so many rows that blocks are shown."""
    return FollowedRun(run_dir, most_cells=int(FollowedRun(run_dir).heads.present().sum()) - 1)


def assert_shown(cubes: Cubes, expected):
    assert cubes.in_blocks
    assert cubes.steps.tolist() == sorted(expected)
    for name in LEVELLED:
        for i, end in enumerate(ENDS):
            column = cubes.column(name, end)
            wanted = np.full(column.shape, np.nan)
            for row, step in enumerate(cubes.steps.tolist()):
                for place, of_place in expected[step].items():
                    wanted[row, cubes.places.index(place)] = of_place[name][i]
            np.testing.assert_allclose(column, wanted, rtol=1e-6, atol=1e-6, err_msg=f"{name} {end}")
    for number, place in enumerate(cubes.places):
        broken = [s for s in sorted(expected) if expected[s].get(place, {"broken": (0,)})["broken"][0]]
        assert cubes.broken_steps(number).tolist() == broken
    present = [[place in expected[step] for place in cubes.places] for step in cubes.steps.tolist()]
    assert cubes.present().tolist() == present


def same(one: Cubes, other: Cubes):
    assert (one.steps.tolist(), one.places, one.measured, one.last, one.stride, one.in_blocks) == (
        other.steps.tolist(), other.places, other.measured, other.last, other.stride, other.in_blocks
    )  # fmt: skip
    for end in ENDS:
        for name, a, b in zip(
            LEVELLED, one.columns(LEVELLED, end), other.columns(LEVELLED, end), strict=True
        ):
            np.testing.assert_array_equal(a, b, err_msg=f"{name} {end}")
    np.testing.assert_array_equal(one.present(), other.present())
    for place in range(len(one.places)):
        assert one.broken_steps(place).tolist() == other.broken_steps(place).tolist()


@pytest.mark.parametrize("seed", range(2))
def test_blocks_are_the_reductions_of_their_records(tmp_path, seed):
    records = random_records(seed, range(-40, 260, 3), calls=2, changing=0.06)
    for _ in write_records(tmp_path, records):
        pass
    run = in_blocks(tmp_path)
    blocks = blocks_of(records, BLOCK)
    assert 3 < len(blocks) < len(records) // BLOCK  # records of other heads begin another block
    assert_shown(run.heads, shown(records, blocks))
    assert run.heads.measured == len(records)
    assert run.heads.last == records[-1].step
    assert run.heads.known(LEVELLED) == set(LEVELLED)
    assert_cubes(run.layers, LAYERS, read_run(tmp_path).layers)
    assert run.problems == () or run.problems == []


def test_a_run_that_grows_while_it_is_shown_in_blocks(tmp_path):
    records = random_records(5, range(0, 420, 4), changing=0.03)
    run = None
    for number, _ in zip(count(), write_records(tmp_path, records), strict=False):
        run = run or FollowedRun(tmp_path, most_cells=120)
        if number % 7 == 0 or number == len(records):
            run.refresh()
            fresh = FollowedRun(tmp_path, most_cells=120)
            same(run.heads, fresh.heads)
            held = next(iter(fresh._columns.values())).held
            visible = blocks_of(records, BLOCK)
            file = fresh._columns[tmp_path / "levels-000-000.arrows"].held
            if fresh.heads.in_blocks:
                on_disk = [r for r in records if r.step in set(held.steps.tolist())]
                assert_shown(run.heads, shown(on_disk, visible[: len(file)]))
    assert run.heads.in_blocks


def test_steps_that_go_back_within_a_session_begin_another_block(tmp_path):
    records = random_records(1, [*range(20), *range(5, 40)], changing=0)
    for _ in write_records(tmp_path, records):
        pass
    run = in_blocks(tmp_path)
    blocks = blocks_of(records, BLOCK)
    assert [block[0].step for block in blocks] == [0, 8, 5, 13, 21, 29]
    assert run.heads.steps.tolist() == [0, 5, 8, 13, 21, 29, 37, 38, 39]


def test_a_session_that_ends_within_a_block_shows_its_own_records(tmp_path):
    first = random_records(1, range(0, 100, 2), changing=0)
    second = random_records(2, range(37, 137, 2), changing=0)
    for records in (first, second):
        for _ in write_records(tmp_path, records):
            pass
    run = in_blocks(tmp_path)
    own = [r for r in first if r.step < 37]
    whole = [block for block in blocks_of(first, BLOCK) if block[-1].step < 37]
    assert len(whole) == 2
    assert_shown(run.heads, shown(own, whole) | shown(second, blocks_of(second, BLOCK)))


def test_a_message_of_blocks_that_is_damaged_leaves_its_records(tmp_path):
    records = random_records(3, range(100), changing=0)
    for _ in write_records(tmp_path, records):
        pass
    path = tmp_path / "levels-000-000.arrows"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    run = in_blocks(tmp_path)
    blocks = blocks_of(records, BLOCK)
    left = [b for b in blocks if b[0].step in set(run._columns[path].held.steps.tolist())]
    assert len(left) == len(blocks) - 2
    assert_shown(run.heads, shown(records, left))
    run.refresh()
    assert_shown(run.heads, shown(records, left))
    assert "levels-000-000.arrows: batch" in run.problems[0]


def test_blocks_of_several_ranks_enclose_what_is_merged(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    ranks = [random_records(seed, range(64), changing=0, broken=0) for seed in range(2)]
    for rank, records in enumerate(ranks):
        for each in records:
            each.heads["rows_read"] = np.full(6, 3 + rank)
            each.heads["max_entropy"] = np.full(6, 4, np.float32)
            for name in ("entropy", "max_logit", "floor_row", "entropy_se"):
                each.heads[name][~np.isfinite(each.heads[name])] = 1
        for _ in write_records(tmp_path, records, rank):
            pass
    run = in_blocks(tmp_path)
    exact = NaiveCubes(read_run(tmp_path).heads)
    for name in LEVELLED:
        values = exact.column(name).reshape(8, BLOCK, 6)
        mean, low, high = (run.heads.column(name, end) for end in ENDS)
        assert (low <= np.nanmin(values, axis=1) + 1e-5).all()
        assert (high >= np.nanmax(values, axis=1) - 1e-5).all()
        if name in ("entropy", SHARE, ABOVE_FLOOR):
            np.testing.assert_allclose(mean, np.nanmean(values, axis=1), rtol=1e-5)


def test_many_small_batches_are_shown_in_blocks_too_unless_rows_are_few(tmp_path, monkeypatch):
    for _ in write_records(tmp_path, random_records(0, range(40), changing=0), flush_every=1):
        pass
    assert not FollowedRun(tmp_path).heads.in_blocks
    monkeypatch.setattr("entropy_monitor.store.cubes.MOST_BATCHES", 39)
    assert not FollowedRun(tmp_path, most_cells=8 * 240).heads.in_blocks
    assert FollowedRun(tmp_path, most_cells=8 * 239).heads.in_blocks
    monkeypatch.setattr("entropy_monitor.store.cubes.MOST_BATCHES", 40)
    assert not FollowedRun(tmp_path, most_cells=8 * 239).heads.in_blocks


def test_a_long_run_without_blocks_is_shown_at_some_of_its_steps(tmp_path):
    records = random_records(0, range(100), changing=0.1)
    turns = write_records(tmp_path, records)
    for _ in range(60):
        next(turns)
    run = FollowedRun(tmp_path, most_cells=50)
    for _ in turns:
        run.refresh()
        assert_strided(run)
    (tmp_path / "levels-000-000.arrows").unlink()
    run = FollowedRun(tmp_path, most_cells=30)
    assert run.heads.stride == 8
    assert_strided(run)
    assert "one of 8 of its steps is" in run.problems[-1]


def assert_strided(run):
    stride, exact = run.heads.stride, NaiveCubes(read_run(run.path).heads)
    if run.heads.in_blocks:
        return
    assert run.heads.steps.tolist() == exact.steps[::stride].tolist()
    assert (run.heads.measured, run.heads.last) == (len(exact.steps), exact.steps[-1])
    for name in figures(HEADS):
        np.testing.assert_allclose(run.heads.column(name), exact.column(name)[::stride], rtol=1e-6, atol=1e-6)


def test_what_has_to_make_room_is_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr("entropy_monitor.store.kept_arrays._MOST_BYTES", 2500)
    write(tmp_path, np.random.default_rng(0), range(0, 300, 10), flush_every=1)
    runs = [FollowedRun(tmp_path), in_blocks(tmp_path)]
    fresh = in_blocks(tmp_path)
    assert_followed(runs[0])
    for end in ENDS:
        for name in LEVELLED:
            np.testing.assert_array_equal(runs[1].heads.column(name, end), fresh.heads.column(name, end))
    assert_followed(runs[0])
    held = [run.heads._kept for run in runs]
    assert sum(array.nbytes for kept in held for array in kept._arrays.values()) <= 2500


def test_arrays_are_read_only_and_stay_as_they_were_given(tmp_path):
    turns = write_records(tmp_path, random_records(0, range(60), changing=0), flush_every=1)
    for _ in range(20):
        next(turns)
    run = FollowedRun(tmp_path)
    given = run.heads.column("entropy")
    kept = given.copy()
    with pytest.raises(ValueError, match="read-only"):
        given[0, 0] = 0
    for _ in turns:
        run.refresh()
        run.heads.column("entropy")
    np.testing.assert_array_equal(given, kept)


def test_what_is_known_of_long_runs_is_told_by_some_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("entropy_monitor.store.cubes._SURELY", 5)
    records = random_records(0, range(40), broken=0, changing=0)
    for number, each in enumerate(records):
        each.heads["floor_paper"][:] = np.nan
        if number:
            each.heads["sigma_qk"][:] = np.nan
        if number < 39:
            each.heads["floor_row"][:] = np.nan
    for _ in write_records(tmp_path, records, flush_every=1):
        pass
    read = []
    decode = Batches.decode
    monkeypatch.setattr(Batches, "decode", lambda self, n, b: read.append(b) or decode(self, n, b))
    for run in (FollowedRun(tmp_path), in_blocks(tmp_path)):
        read.clear()
        assert run.heads.known(LEVELLED) == set(LEVELLED) - {"floor_paper"}
        assert 1 <= len(read) <= 2


def test_a_table_of_no_rows(tmp_path):
    writer = RunWriter(tmp_path)
    writer.open(info())
    writer.log(Record(0, HEADS.empty()))
    writer.close()
    for most_cells in (10**6, 0):
        heads = FollowedRun(tmp_path, most_cells=most_cells).heads
        assert heads.column(SHARE, "low").shape == (0, 0)
        assert (heads.known(LEVELLED), heads.last, heads.measured) == (set(), None, 0)
        assert heads.present().shape == (0, 0)
