from __future__ import annotations

import os
import shutil

import numpy as np
import pytest

from entropy_monitor.errors import RunDirectoryError
from entropy_monitor.records import HEADS, SCALARS, Record
from entropy_monitor.store import FollowedRun, RunWriter, documents, read_run
from entropy_monitor.store.layout import RunFile, file_path, run_files
from tests.store.naive_cubes import assert_followed, follow
from tests.store.random_runs import Shape, record, session, write
from tests.store.samples import event, info, write_run


@pytest.fixture
def g(request):
    return np.random.default_rng(getattr(request, "param", 0))


@pytest.fixture
def two_ranks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")


@pytest.mark.parametrize("seed", range(3))
def test_a_growing_run_is_at_every_look_what_a_fresh_reading_gives(tmp_path, seed):
    g = np.random.default_rng(seed)
    turns = session(tmp_path, g, range(-50, 200, 10), Shape(calls=2), flush_every=1 + seed * 3)
    next(turns)
    run = FollowedRun(tmp_path)
    for number, _ in enumerate(turns):
        if g.random() < 0.4 or number > 23:
            run.refresh()
            assert_followed(run)
    assert run.has_ended
    assert not run.refresh()


@pytest.mark.parametrize("seed", range(3))
def test_ranks_that_write_at_their_own_pace(tmp_path, monkeypatch, seed):
    g = np.random.default_rng(seed)
    monkeypatch.setenv("WORLD_SIZE", "3")
    ranks = [session(tmp_path, g, range(0, 150, 10), rank=r, flush_every=1 + r) for r in range(3)]
    for turns in ranks:
        next(turns)
    run = FollowedRun(tmp_path)
    while ranks:
        turns = ranks[g.integers(len(ranks))]
        if next(turns, None) is None:
            ranks.remove(turns)
        if g.random() < 0.2 or not ranks:
            run.refresh()
            assert_followed(run)


@pytest.mark.parametrize("seed", range(3))
def test_sessions_that_overlap_with_several_ranks_each(tmp_path, monkeypatch, seed):
    g = np.random.default_rng(seed)
    write(tmp_path, g, range(0, 100, 10), close=False)
    run = FollowedRun(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for start, stop in ((50, 90), (70, 120), (110, 130)):
        for rank in range(2):
            write(tmp_path, g, range(start, stop - 10 * rank, 10), rank=rank, flush_every=3)
            run.refresh()
            assert_followed(run)
    write(tmp_path, g, range(-30, 20, 10), Shape(layers=4))
    assert run.refresh()
    assert_followed(run)
    assert_followed(FollowedRun(tmp_path))


def test_of_tensor_parallel_ranks_the_lowest_counts(tmp_path, g, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    plans = [{"a": {"ranks": [0, 1]}}] * 2 + [{"a": {"ranks": [2, 3]}}] * 2
    for rank, plan in enumerate(plans):
        write(tmp_path, g, range(0, 60, 10), rank=rank, plan=plan)
    assert_followed(FollowedRun(tmp_path))


def test_heads_that_are_split_over_ranks_come_side_by_side(tmp_path, g, two_ranks):
    shape = Shape(heads=4)
    write(tmp_path, g, range(0, 60, 10), shape, rank=0, heads=range(2))
    write(tmp_path, g, range(0, 40, 10), shape, rank=1, heads=range(2, 4))
    run = FollowedRun(tmp_path)
    assert_followed(run)
    assert len(run.heads.places) == 12


def test_ranks_with_other_weights_are_left_out_and_named(tmp_path, two_ranks):
    write_run(tmp_path, (0, 10), shift=0.0, events=(event(10),))
    writer = RunWriter(tmp_path, rank=1, flush_seconds=0)
    writer.open(info())
    g = np.random.default_rng(0)
    for step in (0, 10):
        writer.log(record(g, step, Shape(layers=1, changing=0)))
    writer.close()
    for rank in range(2):  # a second session, of strangers in two layers of three
        writer = RunWriter(tmp_path, rank=rank, flush_seconds=0)
        writer.open(info())
        for step in (20, 30, 40):
            made = record(g, step, Shape(changing=0, broken=0))
            for name in ("sigma_q", "sigma_k"):
                made.heads[name][:4] *= 1 + rank
            writer.log(made)
        writer.close()
    run = FollowedRun(tmp_path)
    assert_followed(run)
    assert "session 1: ranks 1 hold other weights" in " ".join(run.problems)


def test_files_of_versions_without_notes(tmp_path, g, monkeypatch):
    monkeypatch.setattr("entropy_monitor.store.appending.note_of", lambda *_: "")
    write(tmp_path, g, range(0, 100, 10))
    monkeypatch.undo()
    run = FollowedRun(tmp_path)
    assert_followed(run)
    write(tmp_path, g, range(50, 120, 10))
    assert run.refresh()
    assert_followed(run)


@pytest.mark.parametrize("what", ["nothing", "one record", "only scalars", "only alerts"])
def test_short_runs(tmp_path, g, what):
    writer = RunWriter(tmp_path, flush_seconds=0)
    writer.open(info())
    if what == "one record":
        writer.log(record(g, 7, Shape(changing=0)))
    elif what == "only scalars":
        scalars = {"step": np.arange(3), "name": ["loss", "lr", "loss"], "value": np.array([1.0, np.nan, 2])}
        writer.log(Record(2, HEADS.empty(), scalars=scalars))
    elif what == "only alerts":
        writer.alert(event(3))
    run = FollowedRun(tmp_path)
    assert_followed(run)
    assert run.heads.column("entropy").shape == ((1, 6) if what == "one record" else (0, 0))
    writer.close()
    run.refresh()
    assert_followed(run)
    assert run.has_ended


def test_of_a_scalar_given_twice_the_last_value_counts_and_ranks_are_averaged(tmp_path, two_ranks):
    for rank, values in enumerate(([1.0, 5.0, 2.0], [4.0, 7.0])):
        writer = RunWriter(tmp_path, rank=rank)
        writer.open(info())
        steps = [0, 0, 1][: len(values)]
        writer.log(Record(1, HEADS.empty(), scalars=SCALARS.empty() | {
            "step": np.array(steps), "name": ["loss"] * len(values), "value": np.array(values)
        }))  # fmt: skip
        writer.close()
    run = FollowedRun(tmp_path)
    assert_followed(run)
    assert run.scalars["loss"][1].tolist() == [6.0, 2.0]


def test_a_look_at_what_did_not_change_reads_nothing(tmp_path, g, monkeypatch):
    write(tmp_path, g, range(5))
    run = follow(tmp_path)
    monkeypatch.setattr("entropy_monitor.store.followed_run.read_info", None)
    assert not run.refresh()


def test_only_what_was_added_is_read(tmp_path, g, monkeypatch):
    turns = session(tmp_path, g, range(30), Shape(changing=0), flush_every=1)
    for _ in range(26):
        next(turns)
    run = follow(tmp_path)
    file = run._columns[file_path(tmp_path, "heads", 0, 0)]
    read, decode = [], file.batches.decode
    monkeypatch.setattr(file.batches, "decode", lambda n, b: read.extend(b) or decode(n, b))
    for _ in range(2):
        next(turns)
    run.refresh()
    run.heads.columns(["entropy", "max_logit"])
    assert read == [25, 26]


def test_a_run_that_vanishes_or_is_of_a_newer_format(tmp_path, g):
    for name in ("a", "b", "c"):
        write(tmp_path / name, g, range(5))
    run = FollowedRun(tmp_path / "a")
    shutil.rmtree(run.path)
    with pytest.raises(RunDirectoryError, match="does not exist"):
        run.refresh()
    with pytest.raises(RunDirectoryError, match="can be read no more"):
        run.heads.column("entropy")

    run = FollowedRun(tmp_path / "b")
    file_path(run.path, "heads", 0, 0).unlink()
    with pytest.raises(RunDirectoryError, match="can be read no more"):
        run.heads.column("entropy")
    assert run.refresh()
    assert_followed(run)

    run = FollowedRun(tmp_path / "c")
    (run.path / "run.json").unlink()
    documents.create(run.path / "run.json", {"format": 99})
    os.utime(file_path(run.path, "heads", 0, 0), (1, 1))
    with pytest.raises(RunDirectoryError, match="format 99"):
        run.refresh()


def test_a_file_that_goes_between_two_looks_at_the_folder(tmp_path, g, monkeypatch):
    write(tmp_path, g, range(5))
    files = [*run_files(tmp_path), RunFile(7, 0, "heads", tmp_path / "heads-007-000.arrows")]
    run = FollowedRun(tmp_path)
    monkeypatch.setattr("entropy_monitor.store.followed_run.run_files_of", lambda _: files)
    with pytest.raises(RunDirectoryError, match="cannot be read"):
        run.refresh()


def test_damage_in_what_nobody_asked_for_is_found_when_the_run_is_verified(tmp_path, g):
    write(tmp_path, g, range(0, 60, 10), Shape(changing=0), flush_every=2)
    for name in ("heads", "levels", "layers"):
        path = file_path(tmp_path, name, 0, 0)
        data = bytearray(path.read_bytes())
        data[-50 if name != "levels" else -8] ^= 1
        path.write_bytes(data)
    run = FollowedRun(tmp_path)
    assert not any("damaged (" in problem for problem in run.damage)
    assert run.heads.measured == 6
    run.verify()
    assert [problem.split(":")[0] for problem in run.damage] == [
        "heads-000-000.arrows",
        "layers-000-000.arrows",
        "levels-000-000.arrows",
    ]
    assert run.problems == run.damage
    assert run.heads.measured == run.layers.measured < 6
    assert_followed(run, damaged=True)
    shutil.rmtree(tmp_path)
    with pytest.raises(RunDirectoryError, match="cannot be read"):
        run.verify()


def test_an_end_that_is_not_whole_is_no_damage(tmp_path, g):
    write(tmp_path, g, range(0, 60, 10), flush_every=2)
    path = file_path(tmp_path, "heads", 0, 0)
    path.write_bytes(path.read_bytes()[:-900])
    run = FollowedRun(tmp_path)
    assert (len(run.problems), run.damage) == (1, [])


@pytest.mark.parametrize("older", [False, True], ids=["noted", "older"])
def test_damage_anywhere_costs_what_it_costs_read_run(tmp_path, monkeypatch, older):
    if older:
        monkeypatch.setattr("entropy_monitor.store.appending.note_of", lambda *_: "")
    g = np.random.default_rng(int(older))
    write(tmp_path, g, range(0, 60, 10), flush_every=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        write(tmp_path, g, range(40, 90, 10), rank=rank, flush_every=2, plan={"a": {"source": "sdpa"}})
    for path in [path for path in sorted(tmp_path.iterdir()) if not path.name.startswith("session")]:
        original = path.read_bytes()
        for _ in range(2 if len(original) > 8 else 0):
            changed = bytearray(original)
            changed[g.integers(len(changed))] ^= 1 << g.integers(8)
            path.write_bytes(changed)
            run = follow(tmp_path)
            assert_followed(run, damaged=True)
            # Batches that a later session overtook are not read, and blocks of a short run neither.
            if path.name in " ".join(read_run(tmp_path).problems) and "-000-" not in path.name:
                assert path.name in " ".join(run.problems)
        path.write_bytes(original)
    assert_followed(FollowedRun(tmp_path))
