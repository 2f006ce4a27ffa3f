from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from entropy_monitor.records import HEADS, SCALARS, TABLES, Columns
from entropy_monitor.store.codec import (
    Texts,
    arrow_schema,
    batch_message,
    fingerprint,
    read_batches,
    schema_message,
    to_batch,
)
from entropy_monitor.store.framing import END, scan
from tests.store.samples import NAMES, columns


def test_nan_is_null_in_nullable_columns_only() -> None:
    given = columns(HEADS, 3)
    for name in ("entropy", "sigma_qk"):
        given[name] = np.array([np.nan, np.inf, -np.inf, 0.5], dtype=np.float32)
    batch = to_batch(HEADS, given)
    assert batch.column("sigma_qk").to_pylist() == [None, np.inf, -np.inf, 0.5]
    assert batch.column("entropy").null_count == 0
    assert np.isnan(batch.column("entropy")[0].as_py())


def test_messages_hold_every_bit_and_plain_arrow_reads_them() -> None:
    batches = [to_batch(HEADS, columns(HEADS, step)) for step in (1, 2, 3)]
    head = schema_message(HEADS, {"who": "me"})
    messages = [batch_message(batches[:2], 1), batch_message(batches[2:], 2)]
    for found in (
        pa.Table.from_batches(read_batches(head, messages)),
        pa.ipc.open_stream(head + b"".join(messages) + END).read_all(),
    ):
        assert found.schema.metadata[b"who"] == b"me"
        assert found.replace_schema_metadata().equals(pa.Table.from_batches(batches))
        assert set(found["layer"].to_pylist()) == set(NAMES)
    assert [len(scan(text).parts) for text in (head, *messages)] == [1, 1, 1]


def test_large_batches_are_compressed() -> None:
    small = to_batch(HEADS, columns(HEADS, 1))
    many = [small] * 500
    assert len(batch_message(many, 1)) < 500 * small.nbytes / 4


def test_a_batch_is_a_copy() -> None:
    given = columns(SCALARS, 0, layers=())
    value = np.array([1.0])
    given.update(step=np.array([5]), name=["loss"], value=value)
    given = {name: given[name] for name in SCALARS.names}
    batch = to_batch(SCALARS, given)
    value[0] = 2.0
    assert batch.column("value").to_pylist() == [1.0]


def test_texts_are_encoded_again_only_when_they_change() -> None:
    texts: Texts = {}
    names = ["a", "b", "c", "d"]
    given = columns(HEADS, 1) | {"layer": names}
    first, again = to_batch(HEADS, given, texts), to_batch(HEADS, given | {"layer": list(names)}, texts)
    names[1] = "other"
    changed = to_batch(HEADS, given, texts)
    assert [b.column("layer").to_pylist() for b in (first, again)] == [["a", "b", "c", "d"]] * 2
    assert again.column("layer").buffers()[2].address == first.column("layer").buffers()[2].address
    assert changed.column("layer").to_pylist() == ["a", "other", "c", "d"]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_empty_tables_have_the_types_of_full_ones(table: object) -> None:
    assert to_batch(table, table.empty()).schema == arrow_schema(table)  # type: ignore[attr-defined,arg-type]


def scalars(**changes: object) -> Columns:
    base: dict[str, object] = {"step": [1], "name": ["loss"], "value": [0.5]}
    return {**base, **changes}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"step": [1], "name": ["x"], "other": [1]}, ValueError, r"missing \['value'\], unknown \['other'\]"),
        (scalars(step=[1, 2]), ValueError, r"different lengths: \{'step': 2, 'name': 1, 'value': 1\}"),
        (scalars(value=[[0.5]]), ValueError, r"'value' must be one-dimensional; its shape is \(1, 1\)"),
        (scalars(step=[1.5]), TypeError, "'step' holds int64; float64 was given"),
    ],
)
def test_other_columns_are_refused(given: Columns, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        to_batch(SCALARS, given)


def test_fingerprints_tell_schemas_apart() -> None:
    schema = arrow_schema(HEADS)
    assert fingerprint(schema) == fingerprint(schema.with_metadata({"a": "b"}))
    others = [
        schema.remove(0),
        schema.set(0, pa.field("step", pa.int32(), nullable=False)),
        schema.set(0, pa.field("step", pa.int64(), nullable=True)),
    ]
    assert fingerprint(schema) not in {fingerprint(other) for other in others}
