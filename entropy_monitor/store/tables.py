"""`StreamReader`: one table's file, read as far as it is sound, again and again while it grows."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from entropy_monitor.records import Table
from entropy_monitor.store.codec import arrow_schema, fingerprint, read_batch, read_schema
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
        for part in found.parts:
            if isinstance(part, Gap):
                self._gap = part.stop - part.start
            else:
                self._take(part, data[part.start : part.stop])
        self._note_tail(found, len(data))
        self._offset += found.stop
        return pa.Table.from_batches(self._batches, schema=arrow_schema(self._table))

    def _forget(self) -> None:
        self._offset = 0
        self._number = -1
        self._gap = 0
        self._schema: pa.Schema | None = None
        self._batches: list[pa.RecordBatch] = []
        self._damage: list[str] = []
        self._tail = ""

    def _take(self, message: Message, data: bytes) -> None:
        self._note_lost(message.number)
        self._number = message.number
        try:
            if message.number == 0:
                self._schema = read_schema(data)
            else:
                batch = read_batch(data, self._schema_for(message))
                self._batches.append(self._conform(batch))
        except (pa.ArrowException, ValueError, OSError) as error:
            self._damage.append(
                f"{self.path.name}: {_batches(message.number, message.number)} cannot be decoded: {error}"
            )

    def _schema_for(self, message: Message) -> pa.Schema:
        if self._schema is not None:
            return self._schema
        # The schema's own message is damaged; each batch says of which schema it is.
        ours = arrow_schema(self._table)
        if message.schema != fingerprint(ours):
            raise ValueError("the schema is damaged, and it is not the one of this version")
        return ours

    def _conform(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The batch with this version's columns: what another version did not know is null."""
        schema = arrow_schema(self._table)
        columns = []
        for field in schema:
            if field.name in batch.schema.names:
                columns.append(batch.column(field.name).cast(field.type))
            elif field.nullable:
                columns.append(pa.nulls(batch.num_rows, field.type))
            else:
                raise ValueError(f"it has no column {field.name!r}, written by another version")
        return pa.record_batch(columns, schema=schema)

    def _note_lost(self, number: int) -> None:
        lost = _batches(self._number + 1, number - 1) if number > self._number + 1 else ""
        if lost:
            size = f" ({self._gap} bytes)" if self._gap else ""
            self._damage.append(f"{self.path.name}: {lost} damaged{size}: not read")
        elif self._gap:
            self._damage.append(
                f"{self.path.name}: {self._gap} damaged bytes before "
                f"{_batches(number, number)}: no batch is missing"
            )
        self._gap = 0

    def _note_tail(self, found: Scan, size: int) -> None:
        self.closed = found.tail == "closed"
        after = (
            f"after {_batches(self._number, self._number)}"
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


def _batches(first: int, last: int) -> str:
    if last <= 0:
        return "the schema"
    if first <= 0:
        return f"the schema and {_batches(1, last)}"
    return f"batch {first}" if first == last else f"batches {first} to {last}"
