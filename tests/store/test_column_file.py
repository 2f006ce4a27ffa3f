from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise

import numpy as np
import pyarrow as pa
import pytest

from entropy_monitor.records import HEADS, LAYERS, Column, Table
from entropy_monitor.store.codec import batch_message, schema_message, to_batch
from entropy_monitor.store.column_file import ColumnFile
from entropy_monitor.store.contents import note_of
from entropy_monitor.store.framing import END
from entropy_monitor.store.places import Place
from entropy_monitor.store.tables import StreamReader
from tests.store.samples import NAMES, columns

STEPS = ((1,), (2, 3, 4), (5, 6), (7,), (8, 9))


def message(number, steps, table=HEADS, noted=True, **changes):
    batches = [to_batch(table, columns(table, step, **changes)) for step in steps]
    return batch_message(batches, number, note_of(table, batches) if noted else "")


def file_of(table=HEADS, noted=True):
    batches = [message(n, steps, table, noted) for n, steps in enumerate(STEPS, 1)]
    return [schema_message(table, {"entropy_monitor.options": "{}"}), *batches]


MESSAGES = file_of()
DATA = b"".join(MESSAGES) + END
BOUNDS = list(accumulate(map(len, MESSAGES)))


def opened(path, data, table=HEADS):
    """A file of which everything was read once, so that all that is damaged is known."""
    path.write_bytes(data)
    return read_all(ColumnFile(path, table))


def read_all(file):
    file.poll()
    file.read(file.table.names[-1:], np.unique(file.held.batches))
    return file


def assert_same(file):
    """All that `StreamReader` finds in the file, in the same order, and problems where it has some."""
    stream = StreamReader(file.batches._path, file.table)
    expected = stream.poll()
    assert file.rows(np.unique(file.held.steps)).equals(expected)
    assert sorted(set(file.held.steps.tolist())) == sorted(set(expected["step"].to_pylist()))
    assert bool(file.problems) == bool(stream.problems)
    assert file.closed or not stream.closed  # which takes damage before the end mark for damage of it


@pytest.fixture
def path(tmp_path):
    return tmp_path / "heads-000-000.arrows"


@pytest.mark.parametrize("table", [HEADS, LAYERS], ids=lambda t: t.name)
@pytest.mark.parametrize("noted", [True, False], ids=["noted", "older"])
def test_columns_of_batches(path, table, noted):
    file = opened(path, b"".join(file_of(table, noted)) + END, table)
    assert file.held.steps.tolist() == list(range(1, 10))
    assert file.held.batches.tolist() == [0, 1, 1, 1, 2, 2, 3, 4, 4]
    rows = 4 if table is HEADS else 2
    assert file.held.firsts.tolist() == [0, 0, rows, 2 * rows, 0, rows, 0, 0, rows]
    (order,) = file.orders
    calls = [(0, 0), (0, 1)] if table is HEADS else [(0, -1)]
    assert order.places == tuple(Place(name, *rest) for name in NAMES for rest in calls)
    found = file.read(["sigma_q", "grad_l2" if table is LAYERS else "entropy"], np.array([3, 1]))
    assert found.starts.tolist() == [0, rows]
    expected = np.concatenate([columns(table, step)["sigma_q"] for step in (7, 2, 3, 4)])
    np.testing.assert_array_equal(found.columns["sigma_q"], expected)
    assert file.first_values("layer_index").tolist() == [0] * 9
    assert file.problems == []
    assert_same(file)


def test_null_is_nan_and_whole_numbers_are_floats(path):
    given = columns(HEADS, 1)
    given["sigma_qk"] = np.array([1, np.nan, np.inf, -0.0], np.float32)
    given["rows_read"] = np.array([1, 2, 3, 4])
    data = schema_message(HEADS, {}) + batch_message([to_batch(HEADS, given)], 1)
    found = opened(path, data).read(["sigma_qk", "rows_read"], np.array([0])).columns
    np.testing.assert_array_equal(found["sigma_qk"], given["sigma_qk"])
    assert (found["rows_read"].dtype, found["rows_read"].tolist()) == (np.float32, [1, 2, 3, 4])


def test_records_that_are_no_neighbours_or_change_their_order(path):
    """Rows of a step apart from each other, layers that come and go, a step that is written twice."""
    steps = [(1, NAMES), (1, NAMES[:1]), (2, NAMES[::-1]), (1, NAMES), (1, NAMES)]
    batches = [to_batch(HEADS, columns(HEADS, step, layers=layers)) for step, layers in steps]
    assert note_of(HEADS, batches) == ""
    file = opened(path, schema_message(HEADS, {}) + batch_message(batches, 1))
    # Rows of one step that follow each other cannot be told apart.
    assert list(zip(file.held.steps, file.held.firsts, file.held.rows, strict=True)) == [
        (1, 0, 6),
        (2, 6, 4),
        (1, 10, 8),
    ]
    assert file.held.orders.tolist() == [0, 1, 2]
    assert_same(file)


def test_every_bit_flip_costs_its_batch_only(path):
    generator = random.Random(0)
    ends = [*BOUNDS, len(DATA)]
    for first, stop in pairwise([0, *ends]):
        for _ in range(40):
            place = generator.randrange(first, stop)
            changed = bytearray(DATA)
            changed[place] ^= 1 << generator.randrange(8)
            file = opened(path, bytes(changed))
            assert_same(file)
            assert file.problems
            hit = sum(end <= place for end in ends)  # 0 is the schema, the last the end mark
            lost = STEPS[hit - 1] if 0 < hit <= len(STEPS) else ()
            assert set(file.held.steps) == set(range(1, 10)) - set(lost)


@pytest.mark.parametrize("word", ["number=", "length=", "start=", "schema=", "crc="])
def test_a_seal_that_lies_hides_no_other_batch(path, word):
    for digit in range(8):
        changed = bytearray(DATA)
        at = changed.index(word.encode(), BOUNDS[1]) + len(word) + digit
        changed[at] = ord("7") if changed[at] != ord("7") else ord("0")
        file = opened(path, bytes(changed))
        assert_same(file)
        assert set(file.held.steps) == set(range(1, 10)) - set(STEPS[1])


def test_a_file_that_is_cut_off_anywhere(path):
    for length in [*range(0, len(DATA), 211), *(b + d for b in [0, *BOUNDS] for d in range(12))]:
        file = opened(path, DATA[:length])
        assert_same(file)
        whole = sum(end <= length for end in BOUNDS[1:])
        assert file.held.steps.tolist() == [step for steps in STEPS[:whole] for step in steps]


@pytest.mark.parametrize("seed", range(2))
def test_noise_and_holes_between_and_within_messages(path, seed):
    generator = random.Random(seed)
    for _ in range(60):
        place = generator.choice([0, *BOUNDS, generator.randrange(len(DATA))])
        hole = generator.choice([0, 1, 5, 700])
        noise = generator.choice([b"", b"\xff\xff\xff\xff", END, generator.randbytes(300), DATA[900:4000]])
        assert_same(opened(path, DATA[:place] + noise + DATA[place + hole :]))


@pytest.mark.parametrize("size", [0, 1, 8, 100, 3000])
def test_garbage(path, size):
    for data in (random.Random(size).randbytes(size), bytes(size), b"\xff" * size):
        assert_same(opened(path, data))
        assert_same(opened(path, DATA[: BOUNDS[1]] + data))
        assert_same(opened(path, data + DATA))


def test_a_lost_schema(path):
    assert_same(opened(path, DATA[BOUNDS[0] :]))
    file = opened(path, DATA[BOUNDS[1] :])
    assert_same(file)
    assert file.held.steps.tolist() == list(range(2, 10))
    assert "the schema and batch 1 damaged" in file.problems[0]


def test_other_versions_columns(path):
    extra = (Column("new", "float32", "", nullable=True), Column("word", "str", ""))
    newer = Table("heads", HEADS.key, (*extra, *HEADS.columns))
    older = Table("heads", HEADS.key, HEADS.columns[:-1])
    for table in (newer, older):
        given = columns(HEADS, 1) | {"new": np.zeros(4, np.float32), "word": ["x"] * 4}
        batch = to_batch(table, {name: given[name] for name in table.names})
        message = batch_message([batch], 1, note_of(table, [batch]))
        file = opened(path, schema_message(table, {}) + message)
        assert_same(file)
        found = file.read(["sigma_qk", "sigma_q"], np.array([0])).columns
        np.testing.assert_array_equal(found["sigma_q"], given["sigma_q"])
        assert np.isnan(found["sigma_qk"]).all() == (table is older)
        assert np.isnan(file.read(["sigma_qk"], np.array([0])).columns["sigma_qk"]).all() == (table is older)
        assert_same(opened(path, message))  # what this version does not know must not be guessed


@pytest.mark.parametrize("lacking", ["step", "call", "layer_index", "entropy", "rows_read"])
@pytest.mark.parametrize("noted", [True, False])
def test_a_version_that_lacks_what_cannot_be_null(path, lacking, noted):
    table = Table("heads", HEADS.key, tuple(c for c in HEADS.columns if c.name != lacking))
    batch = to_batch(HEADS, columns(HEADS, 1))
    note = note_of(HEADS, [batch]) if noted else ""
    data = schema_message(table, {}) + batch_message([batch.drop_columns([lacking])], 1, note)
    file = opened(path, data)
    assert_same(file)
    assert f"batch 1 cannot be decoded: it has no column '{lacking}'" in file.problems[0]


def test_columns_of_other_types_are_cast_or_refused(path):
    for kind, fits in (("float64", True), ("str", False)):
        table = Table("heads", HEADS.key, tuple(
            Column("entropy", kind, "") if c.name == "entropy" else c for c in HEADS.columns
        ))  # fmt: skip
        given = columns(HEADS, 1)
        given["entropy"] = [*"abcd"] if kind == "str" else np.arange(4.0)
        file = opened(path, schema_message(table, {}) + batch_message([to_batch(table, given)], 1))
        found = file.read(["entropy"], np.array([0]))
        assert found.starts.tolist() == [0 if fits else -1]
        assert found.columns["entropy"].tolist() == ([0, 1, 2, 3] if fits else [])
        assert_same(file)


def test_a_growing_file_is_read_on(path):
    path.touch()
    file = ColumnFile(path, HEADS)
    for length in [*range(0, len(DATA), 397), len(DATA)]:
        path.write_bytes(DATA[:length])
        assert_same(read_all(file))
        assert all("still being written" in problem for problem in file.problems)
    assert (file.problems, file.closed) == ([], True)


def test_damage_stays_known_while_the_file_grows(path):
    changed = bytearray(DATA)
    changed[BOUNDS[2] - 9] ^= 1
    file = opened(path, changed[: BOUNDS[2]])
    assert file.held.steps.tolist() == [1]
    for stop in (BOUNDS[3], len(DATA)):
        path.write_bytes(changed[:stop])
        assert_same(read_all(file))
        assert len(file.problems) == 1
    assert "batch 2 damaged" in file.problems[0]


def test_until_it_is_read_a_seal_is_believed(path):
    changed = bytearray(DATA)
    changed[BOUNDS[2] - 9] ^= 1
    path.write_bytes(changed)
    file = ColumnFile(path, HEADS)
    file.poll()
    assert (set(file.held.steps), file.problems) == (set(range(1, 10)), [])
    found = file.read(["entropy"], np.arange(5))
    assert (found.starts[1], len(found.columns["entropy"])) == (-1, 4 * 6)
    assert set(file.held.steps) == {1, *range(5, 10)}
    assert len(file.problems) == 1
    file.read(["entropy"], np.arange(5))
    assert len(file.problems) == 1


def test_another_file_of_the_same_name(path):
    file = opened(path, DATA)
    longer = [schema_message(HEADS, {}), *(message(n, (10 * n,), shift=0.5) for n in range(1, 20))]
    for data in (DATA[: BOUNDS[1]], b"".join(longer), b"".join(longer[:3]), b"", DATA):
        path.write_bytes(data)
        assert_same(read_all(file))


def test_damage_is_found_by_several_threads_at_once(path):
    count = 200
    messages = [message(n, (n,)) for n in range(1, count + 1)]
    changed = [bytearray(m) for m in messages]
    for number in range(0, count, 2):
        changed[number][-20] ^= 1
    path.write_bytes(b"".join([schema_message(HEADS, {}), *changed]))
    file = ColumnFile(path, HEADS)
    file.poll()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda b: file.read(["entropy"], np.array(b)), [[n, n + 1] for n in range(count - 1)]))
    assert file.held.steps.tolist() == list(range(2, count + 1, 2))
    assert len(file.problems) == count / 2
    assert_same(file)


@pytest.mark.parametrize("portion", [1, 3000, 10**9])
def test_many_batches_are_read_in_turn(path, monkeypatch, portion):
    monkeypatch.setattr("entropy_monitor.store.batches._PORTION", portion)
    file = opened(path, DATA)
    parts = list(file.read_each(["sigma_q"], np.array([4, 0, 3, 1])))
    assert np.concatenate([batches for batches, _ in parts]).tolist() == [4, 0, 3, 1]
    assert len(parts) == {1: 4, 10**9: 1}.get(portion, len(parts))
    found = np.concatenate([read.columns["sigma_q"] for _, read in parts])
    expected = [columns(HEADS, step)["sigma_q"] for step in (8, 9, 1, 7, 2, 3, 4)]
    np.testing.assert_array_equal(found, np.concatenate(expected))
    assert list(file.read_each(["sigma_q"], np.arange(0))) == []


def test_portions_and_samples_of_batches(path, monkeypatch):
    file = opened(path, DATA)
    monkeypatch.setattr("entropy_monitor.store.batches._PORTION", len(MESSAGES[1]) + len(MESSAGES[2]))
    portions = list(file.batches.portions(np.arange(5)))
    assert np.concatenate(portions).tolist() == list(range(5))
    assert 1 < len(portions) < 5
    assert list(file.batches.portions(np.arange(0))) == []
    assert file.batches.sample(np.arange(5)).tolist() == [0, 4]
    monkeypatch.setattr("entropy_monitor.store.batches._PORTION", 10**6)
    assert file.batches.sample(np.arange(5)).tolist() == list(range(5))
    assert file.batches.sample(np.array([3])).tolist() == [3]


def test_what_is_decoded_keeps_no_more_in_memory_than_it_needs(path):
    wide = [message(n, (n,), layers=tuple(f"layer.{i}" for i in range(200))) for n in range(1, 60)]
    path.write_bytes(b"".join([schema_message(HEADS, {}), *wide]))
    file = ColumnFile(path, HEADS)
    before = pa.total_allocated_bytes()
    file.poll()
    file.read(["entropy"], np.arange(59))
    assert pa.total_allocated_bytes() - before < 100_000
