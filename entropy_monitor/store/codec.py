"""A table's columns as sealed Arrow messages, and back."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import pyarrow as pa

from entropy_monitor.records import Array, Column, Columns, Table
from entropy_monitor.store.contents import NOTE_KEY
from entropy_monitor.store.framing import SEAL_KEY, blank_seal, seal

_TYPES = {
    "int64": pa.int64(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "str": pa.string(),
}
_WORTH_COMPRESSING = 8192  # bytes; below, zstd saves nothing and makes reading ten times slower
Texts: TypeAlias = dict[str, tuple[list[str], pa.Array]]
"""Text columns by name: what was given, and what it was encoded as."""

_PREFIX = 8  # continuation mark and metadata length, before a message's metadata


def arrow_schema(table: Table) -> pa.Schema:
    """The table's columns with their types on disk."""
    return pa.schema([pa.field(c.name, _TYPES[c.dtype], nullable=c.nullable) for c in table.columns])


def fingerprint(schema: pa.Schema) -> int:
    """A number that is equal for schemas of the same names, types and nullability."""
    text = "\n".join(f"{field.name}:{field.type}:{field.nullable}" for field in schema)
    return zlib.crc32(text.encode())


def to_batch(table: Table, columns: Columns, texts: Texts | None = None) -> pa.RecordBatch:
    """A copy of `columns` in the table's types; NaN in a nullable column becomes null.

    Args:
        table: whose columns they are.
        columns: of equal length.
        texts: of the batch before, and afterwards of this one: what is equal is not encoded again.

    Raises:
        ValueError: a column is missing, unknown, not one-dimensional, or not as long as the others.
        TypeError: a column's values do not fit its type.
    """
    if columns.keys() != set(table.names):
        missing = sorted(set(table.names) - columns.keys())
        unknown = sorted(columns.keys() - set(table.names))
        raise ValueError(f"table {table.name!r} has other columns: missing {missing}, unknown {unknown}")
    texts = {} if texts is None else texts
    arrays = [
        _texts(column, columns[column.name], texts)
        if column.dtype == "str"
        else _numbers(column, columns[column.name])
        for column in table.columns
    ]
    lengths = {column.name: len(array) for column, array in zip(table.columns, arrays, strict=True)}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"table {table.name!r} has columns of different lengths: {lengths}")
    return pa.record_batch(arrays, schema=arrow_schema(table))


def schema_message(table: Table, metadata: Mapping[str, str]) -> bytes:
    """The message that opens a stream, sealed, with `metadata` in it."""
    schema = arrow_schema(table)
    sealed = {**metadata, SEAL_KEY: blank_seal(0, fingerprint(schema))}
    return seal(schema.with_metadata(sealed).serialize().to_pybytes())


def batch_message(batches: Sequence[pa.RecordBatch], number: int, note: str = "") -> bytes:
    """Batches of one schema as one message, sealed, and compressed with zstd where that is worth it.

    Args:
        batches: of the message's rows.
        number: of the message, from 1.
        note: kept in its metadata (see `contents`).
    """
    table = pa.Table.from_batches(batches).combine_chunks()
    (batch,) = table.to_batches()
    sink = io.BytesIO()
    compression = "zstd" if batch.nbytes >= _WORTH_COMPRESSING else None
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(sink, batch.schema, options=options) as writer:
        label = blank_seal(number, fingerprint(batch.schema))
        metadata = {SEAL_KEY: label, NOTE_KEY: note} if note else {SEAL_KEY: label}
        writer.write_batch(batch, custom_metadata=metadata)
        # Read before the stream is closed, which would append its end mark.
        stream = sink.getvalue()
    schema_length = _PREFIX + int.from_bytes(stream[4:_PREFIX], "little")
    return seal(stream[schema_length:])


def read_batches(schema: bytes, batches: Sequence[bytes]) -> list[pa.RecordBatch]:
    """The batches of a stream from its sound messages, the schema's first.

    Raises:
        ValueError: they cannot be decoded, as when another version wrote them.
        OSError: as before, with another reason of Arrow's.
    """
    # Threads would cost more than they save: columns are small.
    options = pa.ipc.IpcReadOptions(use_threads=False)
    stream = pa.py_buffer(b"".join([schema, *batches]))
    with pa.ipc.open_stream(stream, options=options) as reader:
        found = list(reader)
    for batch in found:
        batch.validate()
    return found


def _texts(column: Column, values: Iterable[str], known: Texts) -> pa.Array:
    given = list(values)
    last = known.get(column.name)
    # Comparing lists of the same strings takes a fraction of the time that encoding them does.
    if last is None or last[0] != given:
        last = known[column.name] = given, pa.array([str(value) for value in given], pa.string())
    return last[1]


def _numbers(column: Column, values: Array | Sequence[str]) -> pa.Array:
    given = np.asarray(values)
    if given.ndim != 1:
        raise ValueError(f"column {column.name!r} must be one-dimensional; its shape is {given.shape}")
    if given.size and not np.can_cast(given.dtype, column.dtype, casting="same_kind"):
        raise TypeError(f"column {column.name!r} holds {column.dtype}; {given.dtype} was given")
    array = given.astype(column.dtype)  # always a copy: the caller may reuse its buffers
    return pa.array(array, _TYPES[column.dtype], mask=np.isnan(array) if column.nullable else None)
