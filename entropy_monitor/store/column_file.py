"""`ColumnFile`: one table's file, read by columns, a batch at a time, again and again while it grows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from entropy_monitor.records import Table
from entropy_monitor.store.codec import arrow_schema
from entropy_monitor.store.contents import fingerprint_of, place_columns, read_note
from entropy_monitor.store.framing import END, PREFIX, Gap, Message, is_sound, metadata_length, peek, scan
from entropy_monitor.store.losses import Losses
from entropy_monitor.store.tables import schema_of_this_version

_MOST_METADATA = 1 << 20

Columns = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Record:
    """Rows of one step that stand together: `rows` of them from row `first` of a batch.

    `order` is a key of `ColumnFile.orders`.
    """

    step: int
    batch: int
    first: int
    rows: int
    order: int


@dataclass
class _Batch:
    start: int
    message: Message
    is_sound: bool = False  # until it was read, a seal is believed


class ColumnFile:
    """Knows where in a file which steps are, and reads the columns that are asked for.

    Batches are found by their seals without being read; each is checked when it is.

    Args:
        path: the file.
        table: whose rows it holds; one with places in the model.

    Attributes:
        path: the file.
        closed: whether the writer ended it in order.
        records: what it holds, in the order of writing.
        orders: for each order of rows, the places in the model as columns of `place_columns`.
    """

    def __init__(self, path: Path, table: Table) -> None:
        self.path = path
        self.closed = False
        self._table = table
        self._forget()

    @property
    def problems(self) -> list[str]:
        """What could not be read, and why."""
        return self._losses.in_words

    def poll(self) -> bool:
        """Finds what was added; says whether `records` changed.

        Raises:
            OSError: the file cannot be read.
        """
        with self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < self._offset:
                self._forget()  # another file of this name
            before = len(self.records), self._lost
            while self._advance(file.fileno(), size):
                pass
        return (len(self.records), self._lost) != before

    def read(self, names: Sequence[str], batch: int) -> Columns | None:
        """Columns of figures of one batch, as float32 with NaN for null; None if the batch is damaged.

        A column that the file's version did not know is left out.

        Raises:
            OSError: the file cannot be read.
        """
        decoded = self._decode(batch, names)
        if decoded is None:
            return None
        return {
            name: np.asarray(decoded.column(name).to_numpy(zero_copy_only=False), dtype=np.float32)
            for name in names
            if name in decoded.schema.names
        }

    def first_values(self, name: str) -> list[int]:
        """Of each record the first row's value in a column of whole numbers, in the order of `records`.

        Raises:
            OSError: the file cannot be read.
        """
        column = self._integers.setdefault(name, {})
        for batch in {record.batch for record in self.records} - column.keys():
            decoded = self._decode(batch, [name])
            column[batch] = np.empty(0, np.int64) if decoded is None else decoded.column(name).to_numpy()
        return [int(column[r.batch][r.first]) for r in self.records if len(column[r.batch])]

    def rows(self, batch: int) -> pa.RecordBatch | None:
        """All columns of a batch; None if it is damaged.

        Raises:
            OSError: the file cannot be read.
        """
        return self._decode(batch, arrow_schema(self._table).names)

    def _forget(self) -> None:
        self.records: list[Record] = []
        self.orders: dict[int, dict[str, pa.Array]] = {}
        self._integers: dict[str, dict[int, npt.NDArray[np.int64]]] = {}
        self._offset = 0
        self._lost = 0
        self._schema = b""
        self._names: list[str] = []
        self._batches: list[_Batch] = []
        self._losses = Losses(self.path.name)

    def _advance(self, file: int, size: int) -> bool:
        """Takes in the next message; False where there is none."""
        prefix = os.pread(file, PREFIX, self._offset)
        if not prefix or prefix == END:
            self.closed = prefix == END
            self._losses.tail("closed" if self.closed else "open", 0)
            return False
        length = metadata_length(prefix)
        head = os.pread(file, PREFIX + length, self._offset) if length and length < _MOST_METADATA else b""
        message = peek(head)
        if message is None:
            return self._search(file, size)
        if self._offset + message.stop > size:
            self._losses.tail("torn", size - self._offset)
            return False
        self._take(_Batch(self._offset, message), head)
        self._offset += message.stop
        return True

    def _search(self, file: int, size: int) -> bool:
        """Looks for sound messages where there should be one and is none."""
        data = os.pread(file, size - self._offset, self._offset)
        found = scan(data)
        for part in found.parts:
            if isinstance(part, Gap):
                self._losses.gap(part.stop - part.start)
            else:
                message = Message(part.number, part.schema, 0, part.stop - part.start)
                batch = _Batch(self._offset + part.start, message, is_sound=True)
                self._take(batch, data[part.start : part.stop])
        self._offset += found.stop
        self.closed = found.tail == "closed"
        self._losses.tail(found.tail, len(data) - found.stop)
        return False

    def _take(self, batch: _Batch, head: bytes) -> None:
        self._losses.message(batch.message.number)
        if batch.message.number == 0:
            self._schema = self._bytes(batch) or b""
            return
        self._batches.append(batch)
        place = len(self._batches) - 1
        note = read_note(head)
        if note is None or (note.order not in self.orders and not self._learn(place, note.order, note.rows)):
            self._take_apart(place)
            return
        rows = note.rows
        self.records += [Record(s, place, i * rows, rows, note.order) for i, s in enumerate(note.steps)]

    def _learn(self, batch: int, order: int, rows: int) -> bool:
        """Remembers the places that a batch's first record is of."""
        decoded = self._decode(batch, place_columns(self._table))
        if decoded is None or decoded.num_rows < rows:
            return False
        self.orders[order] = {name: decoded.column(name)[:rows] for name in place_columns(self._table)}
        return True

    def _take_apart(self, batch: int) -> None:
        """Finds the records of a batch that does not say what it holds."""
        names = place_columns(self._table)
        decoded = self._decode(batch, ("step", *names))
        if decoded is None or not decoded.num_rows:
            return
        steps = decoded.column("step").to_numpy()
        starts = np.append(np.flatnonzero(np.append(True, steps[1:] != steps[:-1])), len(steps))
        for first, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            places = {name: pa.concat_arrays([decoded.column(name)[first:stop]]) for name in names}
            order = fingerprint_of([places[name] for name in names])
            self.orders.setdefault(order, places)
            self.records.append(Record(int(steps[first]), batch, first, stop - first, order))

    def _decode(self, batch: int, names: Sequence[str]) -> pa.RecordBatch | None:
        kept = self._batches[batch]
        data = self._bytes(kept)
        if data is None:
            return None
        number = kept.message.number
        try:
            schema = self._schema or schema_of_this_version(self._table, [kept.message])
            if not self._names:
                self._names = pa.ipc.read_schema(pa.py_buffer(schema)).names
            fields = [self._names.index(name) for name in names if name in self._names]
            options = pa.ipc.IpcReadOptions(use_threads=False, included_fields=fields)
            with pa.ipc.open_stream(pa.py_buffer(b"".join([schema, data])), options=options) as reader:
                decoded: pa.RecordBatch = reader.read_next_batch()
            decoded.validate()
        except (pa.ArrowException, ValueError, OSError) as error:
            self._lose(batch)
            self._losses.undecodable(number, number, error)
            return None
        return decoded

    def _bytes(self, batch: _Batch) -> bytes | None:
        """The message, if it is what was written."""
        if batch.message.stop == 0:
            return None
        with self.path.open("rb") as file:
            data = os.pread(file.fileno(), batch.message.stop, batch.start)
        if not batch.is_sound:
            if not is_sound(data):
                self._losses.damaged(batch.message.number, batch.message.stop)
                if batch in self._batches:
                    self._lose(self._batches.index(batch))
                return None
            batch.is_sound = True
        return data

    def _lose(self, batch: int) -> None:
        self._lost += 1
        lost = self._batches[batch]
        self._batches[batch] = _Batch(lost.start, Message(lost.message.number, lost.message.schema, 0, 0))
        self.records = [record for record in self.records if record.batch != batch]
