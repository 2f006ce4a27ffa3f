"""Files that only grow, and never by half a message."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa

from entropy_monitor.records import (
    HEADS,
    LAYERS,
    LEVELS,
    SCALARS,
    TABLES,
    AlertEvent,
    Columns,
    Record,
    Table,
)
from entropy_monitor.store.codec import Texts, batch_message, schema_message, to_batch
from entropy_monitor.store.contents import note_of
from entropy_monitor.store.events import encode_event
from entropy_monitor.store.framing import END
from entropy_monitor.store.layout import file_path
from entropy_monitor.store.levels import Levels

_BLOCKS_AT_ONCE = 16
"""Blocks in a message: one by one they are slow to read."""


class AppendFile:
    """A new file, written at its end and never buffered in this process.

    What `write` has returned for outlives the process, however that ends: it is with the operating
    system.

    Raises:
        FileExistsError: the file is there already.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | getattr(os, "O_BINARY", 0)
        self._descriptor: int | None = os.open(path, flags, 0o666)
        self._length = 0

    def write(self, data: bytes) -> None:
        """Append all of `data`, or nothing of it.

        Raises:
            OSError: the disk is full, or what else the operating system says.
            ValueError: the file is closed.
        """
        if self._descriptor is None:
            raise ValueError(f"{self.path.name} is closed")
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            # Half a message would stand between this and what follows.
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._length)
            raise
        self._length += len(data)

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class TableStream:
    """One table as an Arrow IPC stream: rows are held until `flush` writes them as one batch."""

    def __init__(self, path: Path, table: Table, metadata: Mapping[str, str]) -> None:
        self._file = AppendFile(path)
        self._table = table
        self._texts: Texts = {}
        self._held: list[pa.RecordBatch] = []
        self._number = 0
        try:
            self._file.write(schema_message(table, metadata))
        except OSError:
            self._file.close()
            raise

    @property
    def held(self) -> int:
        """How many batches are held."""
        return len(self._held)

    def encode(self, columns: Columns) -> pa.RecordBatch:
        """A copy of some rows. Raises as `codec.to_batch` does."""
        return to_batch(self._table, columns, self._texts)

    def append(self, batch: pa.RecordBatch) -> None:
        """Hold these rows."""
        if batch.num_rows:
            self._held.append(batch)

    def flush(self) -> None:
        """Write what is held. After an OSError it is still held."""
        if self._held:
            self._file.write(batch_message(self._held, self._number + 1, note_of(self._table, self._held)))
            self._number += 1
            self._held.clear()

    def close(self) -> None:
        """Flush, leave the end mark and close, whether or not writing works."""
        try:
            self.flush()
            self._file.write(END)
        finally:
            self._file.close()

    def abandon(self) -> None:
        """Close without writing anything more."""
        self._file.close()


class SessionFiles:
    """All that one rank of one session appends to: a stream for each table, and the log of alerts.

    Raises:
        OSError: one of the files cannot be made.
    """

    def __init__(self, run_dir: Path, session: int, rank: int, metadata: Mapping[str, str]) -> None:
        self.plan_path = file_path(run_dir, "plan", session, rank)
        self._streams: dict[str, TableStream] = {}
        self._levels = Levels()
        self._alerts = AppendFile(file_path(run_dir, "alerts", session, rank))
        try:
            for table in (*TABLES, LEVELS):
                path = file_path(run_dir, table.name, session, rank)
                self._streams[table.name] = TableStream(path, table, metadata)
        except OSError:
            self.abandon()
            raise

    def append(self, record: Record) -> None:
        """Hold a copy of a record, all of it or nothing. Raises as `codec.to_batch` does."""
        tables = [(HEADS, record.heads), (LAYERS, record.layers), (SCALARS, record.scalars)]
        streams = [(self._streams[table.name], columns) for table, columns in tables]
        batches = [(stream, stream.encode(columns)) for stream, columns in streams]
        block = self._levels.add(record.heads)
        if block is not None:
            levels = self._streams[LEVELS.name]
            batches.append((levels, levels.encode(block)))
        for stream, batch in batches:
            stream.append(batch)

    def append_event(self, event: AlertEvent) -> None:
        """Write what is held, then a change of an alert."""
        self.flush()
        self._alerts.write(encode_event(event))

    def flush(self) -> None:
        """Write what is held; blocks, for which their records stand until then, only once there are some."""
        for name, stream in self._streams.items():
            if name != LEVELS.name or stream.held >= _BLOCKS_AT_ONCE:
                stream.flush()

    def close(self) -> None:
        """Write what is held and end every file, also when one of them raises."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._alerts.close)
            for stream in self._streams.values():
                stack.callback(stream.close)

    def abandon(self) -> None:
        """Close every file without writing anything more."""
        self._alerts.close()
        for stream in self._streams.values():
            stream.abandon()
