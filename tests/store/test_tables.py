from __future__ import annotations

import itertools
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from entropy_monitor.records import HEADS, SCALARS, Table
from entropy_monitor.store.codec import batch_message, schema_message, to_batch
from entropy_monitor.store.framing import END
from entropy_monitor.store.tables import StreamReader
from tests.store.samples import NAMES, columns

BATCHES = [to_batch(HEADS, columns(HEADS, step)) for step in range(4)]
MESSAGES = [schema_message(HEADS, {}), *(batch_message([b], n) for n, b in enumerate(BATCHES, start=1))]
BOUNDS = list(itertools.accumulate(map(len, MESSAGES)))
DATA = b"".join(MESSAGES)


def read(path: Path, data: bytes) -> tuple[pa.Table, list[str]]:
    path.write_bytes(data)
    reader = StreamReader(path, HEADS)
    return reader.poll(), reader.problems


def rows(*numbers: int) -> pa.Table:
    return pa.Table.from_batches([BATCHES[n - 1] for n in numbers], schema=BATCHES[0].schema)


def test_truncation_at_every_byte_costs_the_torn_batch_only(tmp_path: Path) -> None:
    path = tmp_path / "scalars-000-000.arrows"
    batches = [
        to_batch(SCALARS, {"step": np.array([step]), "name": ["loss"], "value": np.array([0.5])})
        for step in range(3)
    ]
    messages = [schema_message(SCALARS, {}), *(batch_message([b], n) for n, b in enumerate(batches, 1))]
    bounds = list(itertools.accumulate(map(len, messages)))
    data = b"".join(messages)
    for length in range(len(data) + 1):
        path.write_bytes(data[:length])
        reader = StreamReader(path, SCALARS)
        whole = sum(bound <= length for bound in bounds[1:])
        assert reader.poll()["step"].to_pylist() == list(range(whole))
        if length in (0, *bounds):
            assert reader.problems == []
        else:
            (problem,) = reader.problems
            assert "still being written, or cut short" in problem


def test_bit_flips_are_found_and_cost_one_batch(tmp_path: Path) -> None:
    path = tmp_path / "heads-000-000.arrows"
    generator = random.Random(0)
    data = DATA + END
    for _ in range(600):
        place, bit = generator.randrange(len(data)), generator.randrange(8)
        changed = bytearray(data)
        changed[place] ^= 1 << bit
        found, problems = read(path, bytes(changed))
        hit = sum(bound <= place for bound in BOUNDS)  # 0 is the schema, 5 the end mark
        assert found.equals(rows(*(n for n in range(1, 5) if n != hit)))
        assert len(problems) == 1
        named = "the schema" if hit == 0 else f"batch {hit}" if hit < 4 else f"after batch {hit - 1}"
        assert named in problems[0]
        assert "heads-000-000.arrows" in problems[0]


def test_what_is_lost_is_numbered(tmp_path: Path) -> None:
    path = tmp_path / "heads-000-000.arrows"
    hole = bytes(BOUNDS[2] - BOUNDS[0])
    found, problems = read(path, DATA[: BOUNDS[0]] + hole + DATA[BOUNDS[2] :])
    assert found.equals(rows(3, 4))
    assert problems == [f"heads-000-000.arrows: batches 1 to 2 damaged ({len(hole)} bytes): not read"]
    found, problems = read(path, DATA[BOUNDS[1] :])
    assert found.equals(rows(2, 3, 4))
    assert problems == ["heads-000-000.arrows: the schema and batch 1 damaged: not read"]
    _, problems = read(path, DATA[: BOUNDS[1]] + b"noise" + DATA[BOUNDS[1] :])
    assert problems == ["heads-000-000.arrows: 5 damaged bytes before batch 2: no batch is missing"]


@pytest.mark.parametrize("seed", range(5))
def test_garbage_neither_crashes_nor_takes_memory(tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    garbage = generator.randbytes(3000)
    path = tmp_path / "heads-000-000.arrows"
    tracemalloc.start()
    for data in (garbage, b"\xff" * 3000, DATA[: BOUNDS[0]] + garbage, garbage + DATA[BOUNDS[0] :]):
        before = pa.total_allocated_bytes()
        _, problems = read(path, data)
        assert problems
        assert pa.total_allocated_bytes() - before < 1e6
    assert tracemalloc.get_traced_memory()[1] < 1e7
    tracemalloc.stop()


def test_flipped_lengths_allocate_nothing(tmp_path: Path) -> None:
    # Arrow itself believes the lengths in its metadata and before each compressed buffer.
    batch = to_batch(HEADS, columns(HEADS, 1, layers=NAMES * 40))
    message = batch_message([batch], 1)
    path = tmp_path / "heads-000-000.arrows"
    for place in range(4, len(message), 41):
        changed = bytearray(message)
        changed[place] ^= 0x80
        found, problems = read(path, MESSAGES[0] + changed)
        assert found.num_rows == 0
        assert problems


def test_a_growing_file_is_read_on(tmp_path: Path) -> None:
    path = tmp_path / "heads-000-000.arrows"
    path.touch()
    reader = StreamReader(path, HEADS)
    length = 0
    for length in range(0, len(DATA) + 400, 400):
        path.write_bytes((DATA + END)[:length])
        whole = sum(bound <= length for bound in BOUNDS[1:])
        assert reader.poll().equals(rows(*range(1, whole + 1)))
        assert all("still being written" in problem for problem in reader.problems)
    assert reader.problems == []
    assert reader.closed
    path.write_bytes(DATA[: BOUNDS[1]])  # another file in its place
    assert reader.poll().equals(rows(1))
    assert not reader.closed


def test_damage_stays_known_while_the_file_grows(tmp_path: Path) -> None:
    path = tmp_path / "heads-000-000.arrows"
    changed = bytearray(DATA)
    changed[BOUNDS[1] + 50] ^= 1
    path.write_bytes(changed[: BOUNDS[2]])
    reader = StreamReader(path, HEADS)
    assert reader.poll().equals(rows(1))
    assert "damaged bytes after batch 1" in reader.problems[0]
    path.write_bytes(changed)
    assert reader.poll().equals(rows(1, 3, 4))
    assert "batch 2 damaged" in reader.problems[0]
    reader.poll()
    assert len(reader.problems) == 1


def test_other_versions_columns_are_null_or_left_out(tmp_path: Path) -> None:
    path = tmp_path / "heads-000-000.arrows"
    older = Table("heads", HEADS.key, HEADS.columns[:-1])
    given = columns(HEADS, 1)
    del given["sigma_qk"]
    found, problems = read(path, schema_message(older, {}) + batch_message([to_batch(older, given)], 1))
    assert problems == []
    assert found.schema.equals(BATCHES[0].schema)
    assert found["sigma_qk"].null_count == found.num_rows == 4

    # Without its schema, what this version does not know cannot be decoded, and must not be guessed.
    found, problems = read(path, batch_message([to_batch(older, given)], 1))
    assert found.num_rows == 0
    assert "not the one of this version" in problems[-1]

    lacking = Table("heads", HEADS.key, HEADS.columns[:-1][1:])
    del given["step"]
    data = schema_message(lacking, {}) + batch_message([to_batch(lacking, given)], 1)
    found, problems = read(path, data)
    assert found.num_rows == 0
    assert "batch 1 cannot be decoded: it has no column 'step'" in problems[0]
