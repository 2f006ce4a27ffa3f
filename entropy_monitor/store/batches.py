"""`Batches`: the record batches of a file that grows: where they lie, and columns of them."""

from __future__ import annotations

import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from entropy_monitor.records import Table
from entropy_monitor.store.codec import arrow_schema
from entropy_monitor.store.framing import Gap, is_sound, seals
from entropy_monitor.store.held_records import Ints
from entropy_monitor.store.losses import Losses
from entropy_monitor.store.message_walk import MessageWalk, Placed, read_at
from entropy_monitor.store.tables import conform, schema_of_this_version

_PORTION = 4_000_000
"""Bytes of messages that are decoded together: one by one, small ones take half as long again."""

_THREADS = 2
"""That decode, which lets go of the interpreter's lock."""

_SAMPLE = 64
"""Most batches of a sample."""


@dataclass(frozen=True)
class Decoded:
    """Columns of some batches.

    Attributes:
        batches: those that could be read, in the order in which they were asked for.
        sizes: how many rows each has.
        rows: of all of them.
    """

    batches: list[int]
    sizes: list[int]
    rows: pa.Table

    def of_each(self) -> Iterator[tuple[int, pa.Table]]:
        """Each batch and its rows."""
        first = 0
        for batch, size in zip(self.batches, self.sizes, strict=True):
            yield batch, self.rows.slice(first, size)
            first += size


class Batches:
    """Finds batches by their seals without reading them, and checks each whenever it is read.

    Batches are numbered from 0 as they are found. One that turns out to be damaged is known no more.
    `decode` may be called from several threads at once.

    Args:
        path: the file.
        table: whose rows it holds.

    Attributes:
        closed: whether the writer ended the file in order.
        generation: counts the files of this name that were seen.
        lost: the batches that turned out to be damaged.
    """

    def __init__(self, path: Path, table: Table) -> None:
        self.closed = False
        self.generation = 0
        self._path = path
        self._table = table
        self._target = arrow_schema(table)
        self._lock = threading.Lock()
        self._forget()

    @property
    def problems(self) -> list[str]:
        """What could not be read, and why."""
        return self._losses.in_words

    def poll(self) -> Iterator[tuple[int, bytes]]:
        """The batches that were added, each with its metadata; `generation` grows where it is another file.

        Raises:
            OSError: the file cannot be read.
        """
        with self._path.open("rb", buffering=0) as file:
            if not self._walk.is_of(file):
                self._forget()
            for found in self._walk.advance(file):
                if isinstance(found, Gap):
                    self._losses.gap(found.stop - found.start)
                    continue
                self._losses.message(found.number)
                if found.number == 0:
                    self._schema = found.head  # it has no body
                else:
                    yield self._taken(found), found.head
        self.closed = self._walk.tail == "closed"
        self._losses.tail(self._walk.tail, self._walk.tail_size)

    def portions(self, batches: Ints) -> Iterator[Ints]:
        """Batches in groups that are worth decoding at once."""
        if len(batches):
            of = np.cumsum(self._sizes(batches)) // _PORTION
            yield from np.split(batches, np.flatnonzero(np.diff(of)) + 1)

    def sample(self, batches: Ints) -> Ints:
        """Some of these batches, the first and the last among them; no more than are read quickly."""
        most = min(_SAMPLE, max(2, _PORTION // int(self._sizes(batches).max(initial=1))))
        return batches[np.unique(np.linspace(0, len(batches) - 1, min(len(batches), most)).astype(np.intp))]

    def decode(self, names: Sequence[str], batches: Sequence[int]) -> Decoded:
        """Columns of those batches that can be read; null in what the file's version did not know.

        Raises:
            OSError: the file cannot be read.
        """
        messages = self._messages(batches)
        wanted = pa.schema([self._target.field(name) for name in names])
        try:
            rows, sizes = self._decoded(wanted, list(messages.values()))
        except (pa.ArrowException, ValueError, OSError) as error:
            why = str(error)
            if len(messages) == 1:
                self._lose(next(iter(messages)), lambda n, _: self._losses.undecodable(n, n, why))
                return Decoded([], [], wanted.empty_table())
            each = [self.decode(names, [batch]) for batch in messages]  # which of them it was
            return Decoded(
                [batch for one in each for batch in one.batches],
                [size for one in each for size in one.sizes],
                pa.concat_tables([wanted.empty_table(), *(one.rows for one in each)]),
            )
        return Decoded(list(messages), sizes, rows)

    def verify(self) -> None:
        """Checks every batch: what is damaged is known afterwards.

        Raises:
            OSError: the file cannot be read.
        """
        for portion in self.portions(np.arange(len(self._starts))):
            self._messages(portion.tolist())

    def decode_each(self, names: Sequence[str], batches: Ints) -> Iterator[tuple[Ints, Decoded]]:
        """Columns of batches, portion by portion, while the next ones are being decoded.

        Raises:
            OSError: the file cannot be read.
        """
        portions = list(self.portions(batches))
        if len(portions) < 2:
            yield from ((portion, self.decode(names, portion.tolist())) for portion in portions)
            return
        waiting: deque[tuple[Ints, Future[Decoded]]] = deque()
        with ThreadPoolExecutor(_THREADS) as pool:
            for portion in portions:
                waiting.append((portion, pool.submit(self.decode, names, portion.tolist())))
                if len(waiting) > _THREADS:
                    done, decoding = waiting.popleft()
                    yield done, decoding.result()
            for done, decoding in waiting:
                yield done, decoding.result()

    def _forget(self) -> None:
        self.generation += 1
        self.lost: set[int] = set()
        self._walk = MessageWalk()
        self._losses = Losses(self._path.name)
        self._schema = b""
        self._columns: list[str] = []
        self._starts, self._lengths, self._numbers = array("q"), array("q"), array("q")

    def _taken(self, found: Placed) -> int:
        self._starts.append(found.start)
        self._lengths.append(found.stop - found.start)
        self._numbers.append(found.number)
        return len(self._starts) - 1

    def _sizes(self, batches: Ints) -> Ints:
        return np.frombuffer(self._lengths, np.int64)[batches] if len(batches) else batches

    def _decoded(self, wanted: pa.Schema, messages: Sequence[memoryview]) -> tuple[pa.Table, list[int]]:
        if not messages:
            return wanted.empty_table(), []
        schema = self._schema or schema_of_this_version(
            self._table, [seal.schema for message in messages for seal in [next(seals(message))]]
        )
        if not self._columns:
            self._columns = pa.ipc.read_schema(pa.py_buffer(schema)).names
        lacking = [
            field.name for field in self._target if not field.nullable and field.name not in self._columns
        ]
        if lacking:
            raise ValueError(f"it has no column {lacking[0]!r}, written by another version")
        # Of no columns at all Arrow would give every one.
        fields = [self._columns.index(name) for name in wanted.names if name in self._columns] or [0]
        options = pa.ipc.IpcReadOptions(use_threads=False, included_fields=fields)
        with pa.ipc.open_stream(pa.py_buffer(b"".join([schema, *messages])), options=options) as reader:
            rows = reader.read_all()
        rows.validate()
        sizes = [len(chunk) for chunk in rows.column(0).chunks]
        if len(sizes) != len(messages):
            raise ValueError(f"{len(messages)} messages hold {len(sizes)} batches")
        return conform(rows, wanted), sizes

    def _messages(self, batches: Sequence[int]) -> dict[int, memoryview]:
        """The bytes of those batches that are what was written."""
        found: dict[int, memoryview] = {}
        with self._path.open("rb", buffering=0) as file:
            for some in _adjoining([batch for batch in batches if batch not in self.lost]):
                start = self._starts[some[0]]
                stop = self._starts[some[-1]] + self._lengths[some[-1]]
                data = memoryview(read_at(file, start, stop - start))
                for batch in some:
                    at = self._starts[batch] - start
                    message = data[at : at + self._lengths[batch]]
                    if is_sound(message):
                        found[batch] = message
                    else:
                        self._lose(batch, self._losses.damaged)
        return found

    def _lose(self, batch: int, told: Callable[[int, int], None]) -> None:
        """Knows a batch no more; `told` takes its number and size, once."""
        with self._lock:
            if batch not in self.lost:
                self.lost.add(batch)
                told(self._numbers[batch], self._lengths[batch])


def _adjoining(batches: Sequence[int]) -> list[list[int]]:
    """Batches in runs of such as follow each other."""
    runs: list[list[int]] = []
    for batch in batches:
        if runs and batch == runs[-1][-1] + 1:
            runs[-1].append(batch)
        else:
            runs.append([batch])
    return runs
