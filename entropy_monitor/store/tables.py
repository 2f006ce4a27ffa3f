"""`StreamReader`: one table's file, read as far as it is sound, again and again while it grows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from entropy_monitor.records import Table
from entropy_monitor.store.codec import arrow_schema, fingerprint, read_batches, schema_message
from entropy_monitor.store.framing import Gap, Message, Scan, scan


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
        return [*self._damage, *([self._tail] if self._tail else [])]

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
                self._gap = part.stop - part.start
                continue
            self._note_lost(part.number)
            self._number = part.number
            if part.number == 0:
                self._schema = data[part.start : part.stop]
            else:
                batches.append(part)
        self._decode(batches, data)
        self._note_tail(found, len(data))
        self._offset += found.stop
        return pa.Table.from_batches(self._batches, schema=self._target)

    def _forget(self) -> None:
        self._offset = 0
        self._number = -1
        self._gap = 0
        self._schema = b""
        self._batches: list[pa.RecordBatch] = []
        self._damage: list[str] = []
        self._tail = ""

    def _decode(self, messages: Sequence[Message], data: bytes) -> None:
        if not messages:
            return
        try:
            schema = self._schema or self._lost_schema(messages)
            batches = read_batches(schema, [data[m.start : m.stop] for m in messages])
            self._batches += [self._conform(batch) for batch in batches]
        except (pa.ArrowException, ValueError, OSError) as error:
            which = _named(messages[0].number, messages[-1].number)
            self._damage.append(f"{self.path.name}: {which} cannot be decoded: {error}")

    def _lost_schema(self, messages: Sequence[Message]) -> bytes:
        """This version's schema, in the place of a damaged one, if the batches say that it was theirs."""
        if any(message.schema != fingerprint(self._target) for message in messages):
            raise ValueError("the schema is damaged, and it is not the one of this version")
        return schema_message(self._table, {})

    def _conform(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The batch with this version's columns: what another version did not know is null."""
        if batch.schema.equals(self._target):
            return batch
        columns = []
        for field in self._target:
            if field.name in batch.schema.names:
                columns.append(batch.column(field.name).cast(field.type))
            elif field.nullable:
                columns.append(pa.nulls(batch.num_rows, field.type))
            else:
                raise ValueError(f"it has no column {field.name!r}, written by another version")
        return pa.record_batch(columns, schema=self._target)

    def _note_lost(self, number: int) -> None:
        lost = _named(self._number + 1, number - 1) if number > self._number + 1 else ""
        if lost:
            size = f" ({self._gap} bytes)" if self._gap else ""
            self._damage.append(f"{self.path.name}: {lost} damaged{size}: not read")
        elif self._gap:
            self._damage.append(
                f"{self.path.name}: {self._gap} damaged bytes before "
                f"{_named(number, number)}: no batch is missing"
            )
        self._gap = 0

    def _note_tail(self, found: Scan, size: int) -> None:
        self.closed = found.tail == "closed"
        after = (
            f"after {_named(self._number, self._number)}"
            if found.parts or self._number >= 0
            else "from the start"
        )
        rest = size - found.stop
        if found.tail == "damaged":
            self._tail = f"{self.path.name}: {rest} damaged bytes {after}: not read"
        elif found.tail == "torn":
            self._tail = (
                f"{self.path.name}: {rest} bytes {after} are no whole batch: "
                "still being written, or cut short"
            )
        else:
            self._tail = ""


def _named(first: int, last: int) -> str:
    if last <= 0:
        return "the schema"
    if first <= 0:
        return f"the schema and {_named(1, last)}"
    return f"batch {first}" if first == last else f"batches {first} to {last}"
