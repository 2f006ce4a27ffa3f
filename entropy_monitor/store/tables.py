"""`StreamReader`: one table's file, read as far as it is sound, again and again while it grows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from entropy_monitor.records import Table
from entropy_monitor.store.codec import arrow_schema, fingerprint, read_batches, schema_message
from entropy_monitor.store.framing import Gap, Message, scan
from entropy_monitor.store.losses import Losses

_Rows = TypeVar("_Rows", pa.RecordBatch, pa.Table)

_MOST_PIECES = 256
"""Batches that a table is left in: of many small ones every look at it takes long."""


class StreamReader:
    """Reads what was added since it last looked; what it has read once stays as it was read.

    Attributes:
        path: the file.
        closed: whether the writer ended the file in order.
        problems: what could not be read, and why it does not matter or does.
    """

    def __init__(self, path: Path, table: Table) -> None:
        self.path = path
        self.closed = False
        self._table = table
        self._target = arrow_schema(table)
        self._forget()

    @property
    def problems(self) -> list[str]:
        """What could not be read, each with the file, the batches (from 1) and the bytes concerned."""
        return self._losses.in_words

    def poll(self) -> pa.Table:
        """All rows that are there now, in the order of writing.

        Raises:
            OSError: the file cannot be read.
        """
        with self.path.open("rb") as file:
            if file.seek(0, 2) < self._offset:
                self._forget()  # another file of this name
            file.seek(self._offset)
            data = file.read()
        found = scan(data)
        batches = []
        for part in found.parts:
            if isinstance(part, Gap):
                self._losses.gap(part.stop - part.start)
                continue
            self._losses.message(part.number)
            if part.number == 0:
                self._schema = data[part.start : part.stop]
            else:
                batches.append(part)
        self._decode(batches, data)
        self.closed = found.tail == "closed"
        self._losses.tail(found.tail, len(data) - found.stop)
        self._offset += found.stop
        whole = pa.Table.from_batches(self._batches, schema=self._target)
        if len(self._batches) > _MOST_PIECES:
            whole = whole.combine_chunks()
            self._batches[:] = whole.to_batches()
        return whole

    def _forget(self) -> None:
        self._offset = 0
        self._losses = Losses(self.path.name)
        self._schema = b""
        self._batches: list[pa.RecordBatch] = []

    def _decode(self, messages: Sequence[Message], data: bytes) -> None:
        if not messages:
            return
        try:
            schema = self._schema or schema_of_this_version(self._table, [m.schema for m in messages])
            batches = read_batches(schema, [data[m.start : m.stop] for m in messages])
            self._batches += [conform(batch, self._target) for batch in batches]
        except (pa.ArrowException, ValueError, OSError) as error:
            self._losses.undecodable(messages[0].number, messages[-1].number, error)


def conform(batch: _Rows, schema: pa.Schema) -> _Rows:
    """Rows of any version with the columns of `schema`: what that version did not know is null.

    Raises:
        ValueError: it lacks a column that cannot be null.
    """
    if batch.schema.equals(schema):
        return batch
    columns = []
    for field in schema:
        if field.name in batch.schema.names:
            columns.append(batch.column(field.name).cast(field.type))
        elif field.nullable:
            columns.append(pa.nulls(batch.num_rows, field.type))
        else:
            raise ValueError(f"it has no column {field.name!r}, written by another version")
    return type(batch).from_arrays(columns, schema=schema)


def schema_of_this_version(table: Table, fingerprints: Iterable[int]) -> bytes:
    """This version's schema message, in the place of a damaged one, if the batches say that it was theirs.

    Raises:
        ValueError: it was another.
    """
    if any(found != fingerprint(arrow_schema(table)) for found in fingerprints):
        raise ValueError("the schema is damaged, and it is not the one of this version")
    return schema_message(table, {})
