"""`ColumnFile`: one table's file, read by columns, some batches at a time, again and again while it grows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from entropy_monitor.records import Table
from entropy_monitor.store.batches import Batches, Decoded
from entropy_monitor.store.codec import arrow_schema
from entropy_monitor.store.contents import Contents, place_columns, read_note
from entropy_monitor.store.held_records import HeldRecords, Ints
from entropy_monitor.store.places import Order

_AT_ONCE = 1 << 15
"""Batches whose notes are gathered before they are taken in: there may be millions of small ones."""


@dataclass(frozen=True)
class Portion:
    """Columns of some batches.

    Attributes:
        starts: for each batch that was asked for, where its rows begin; -1 for one that is damaged.
        columns: by name, of all their rows: float32; NaN for null, and for what the file's version lacked.
    """

    starts: Ints
    columns: dict[str, npt.NDArray[np.float32]]


class ColumnFile:
    """Knows where in a file which steps are, and reads the columns that are asked for.

    Batches that say what they hold (`contents`) are believed until they are read. `read` may be called from
    several threads at once.

    Args:
        path: the file.
        table: whose rows it holds; one with places in the model.

    Attributes:
        table: whose rows it holds.
        batches: what the file consists of.
        orders: what the rows of a record can be of, one after another.
    """

    def __init__(self, path: Path, table: Table) -> None:
        self.table = table
        self.batches = Batches(path, table)
        self._generation = 0
        self._held = HeldRecords.none()
        self._without = 0  # so many lost batches
        self._follow()

    @property
    def closed(self) -> bool:
        """Whether the writer ended it in order."""
        return self.batches.closed

    @property
    def problems(self) -> list[str]:
        """What could not be read, and why."""
        return self.batches.problems

    @property
    def held(self) -> HeldRecords:
        """The records that it holds."""
        if len(self.batches.lost) != self._without:
            self._without = len(self.batches.lost)
            lost = np.fromiter(self.batches.lost, np.int64)
            self._held = self._held[np.isin(self._held.batches, lost, invert=True)]
        return self._held

    def poll(self) -> None:
        """Finds what was added.

        Raises:
            OSError: the file cannot be read.
        """
        for batch, metadata in self.batches.poll():
            self._follow()
            self._new.append((batch, read_note(metadata)))
            if len(self._new) == _AT_ONCE:
                self._index()
        self._follow()
        self._index()

    def read(self, names: Sequence[str], batches: Ints) -> Portion:
        """Columns of numbers of some batches.

        Raises:
            OSError: the file cannot be read.
        """
        return _portion(names, batches, self.batches.decode(names, batches.tolist()))

    def read_each(self, names: Sequence[str], batches: Ints) -> Iterator[tuple[Ints, Portion]]:
        """The same of many batches, some at a time.

        Raises:
            OSError: the file cannot be read.
        """
        for some, found in self.batches.decode_each(names, batches):
            yield some, _portion(names, some, found)

    def first_values(self, name: str) -> Ints:
        """`[N]`: of each record of `held` the first row's value in a column of whole numbers.

        Raises:
            OSError: the file cannot be read.
        """
        known = self._first_values.setdefault(name, {})
        new = np.setdiff1d(self.held.batches, np.fromiter(known, np.int64))
        for _, found in self.batches.decode_each([name], new):
            known |= {batch: rows.column(name).to_numpy() for batch, rows in found.of_each()}
        places = zip(self.held.batches.tolist(), self.held.firsts.tolist(), strict=True)
        return np.array([known[batch][first] for batch, first in places], dtype=np.int64)

    def rows(self, steps: Sequence[int]) -> pa.Table:
        """All rows of some steps, in the order of writing.

        Raises:
            OSError: the file cannot be read.
        """
        held = self.held[np.isin(self.held.steps, steps)]
        found = dict(self.batches.decode(self.table.names, np.unique(held.batches).tolist()).of_each())
        where = zip(held.batches.tolist(), held.firsts.tolist(), held.rows.tolist(), strict=True)
        parts = [found[batch].slice(first, count) for batch, first, count in where if batch in found]
        return pa.concat_tables([arrow_schema(self.table).empty_table(), *parts])

    def _follow(self) -> None:
        """Begins anew with another file."""
        if self.batches.generation == self._generation:
            return
        self._generation = self.batches.generation
        self._without = 0
        self._held = HeldRecords.none()
        self._new: list[tuple[int, Contents | None]] = []
        self.orders: list[Order] = []
        self._order_numbers: dict[int | bytes, int] = {}
        self._layer_numbers: dict[str, int] = {}
        self._first_values: dict[str, dict[int, Ints]] = {}

    def _index(self) -> None:
        """Finds the records of the batches that are new."""
        if not self._new:
            return
        noted: list[tuple[int, Contents]] = []
        others: list[int] = []
        for batch, note in self._new:
            if note is not None and (note.order in self._order_numbers or self._learn(batch, note)):
                noted.append((batch, note))
            else:
                others.append(batch)
        held = HeldRecords.joined([self._held, self._noted(noted), *self._unnoted(others)])
        self._held = held[np.argsort(held.batches, kind="stable")] if others else held
        self._without = 0
        self._new.clear()

    def _learn(self, batch: int, note: Contents) -> bool:
        """Remembers what the rows of a batch's records are of; whether the batch is what its note says."""
        rows = self.batches.decode(place_columns(self.table), [batch]).rows
        if rows.num_rows < note.rows:
            return False
        self._number(note.order, rows.slice(0, note.rows))
        return True

    def _noted(self, batches: Sequence[tuple[int, Contents]]) -> HeldRecords:
        """The records of batches that say what they hold."""
        counts = np.array([len(note.steps) for _, note in batches], dtype=np.int64)
        fields = [(batch, note.rows, self._order_numbers[note.order]) for batch, note in batches]
        of, rows, orders = np.repeat(np.array(fields, dtype=np.int64).reshape(-1, 3), counts, axis=0).T
        places = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
        steps = np.array([step for _, note in batches for step in note.steps], dtype=np.int64)
        return HeldRecords(steps, of, places * rows, rows, orders)

    def _unnoted(self, batches: Sequence[int]) -> Iterator[HeldRecords]:
        """The records of other batches: rows of one step that stand together."""
        names = place_columns(self.table)
        for _, found in self.batches.decode_each(("step", *names), np.array(batches, dtype=np.int64)):
            sizes = np.array(found.sizes, dtype=np.int64)
            steps = found.rows["step"].to_numpy()
            of = np.repeat(np.array(found.batches, dtype=np.int64), sizes)
            begins = np.repeat(np.cumsum(sizes) - sizes, sizes)
            changes = (np.diff(steps) != 0) | (np.diff(of) != 0)
            firsts = np.flatnonzero(np.append(len(steps) > 0, changes))
            counts = np.diff(np.append(firsts, len(steps)))
            keys = self._keys(found.rows.select(names))
            orders = np.array(
                [
                    self._number(keys[first : first + count].tobytes(), found.rows.slice(first, count))
                    for first, count in zip(firsts.tolist(), counts.tolist(), strict=True)
                ],
                dtype=np.int64,
            )
            yield HeldRecords(steps[firsts], of[firsts], firsts - begins[firsts], counts, orders)

    def _keys(self, rows: pa.Table) -> Ints:
        """`[rows, columns]`: numbers that are equal where places are."""
        columns = []
        for column in rows.columns:
            if pa.types.is_string(column.type):
                coded = column.combine_chunks().dictionary_encode()
                texts = coded.dictionary.to_pylist()
                numbers = [self._layer_numbers.setdefault(text, len(self._layer_numbers)) for text in texts]
                columns.append(np.array(numbers, dtype=np.int64)[coded.indices.to_numpy()])
            else:
                columns.append(column.to_numpy())
        return np.stack(columns, axis=1)

    def _number(self, key: int | bytes, rows: pa.Table) -> int:
        """The number of the order of a record's rows, which `key` tells from other orders."""
        if key not in self._order_numbers:
            self._order_numbers[key] = len(self.orders)
            self.orders.append(Order.of(rows))
        return self._order_numbers[key]


def _portion(names: Sequence[str], batches: Ints, found: Decoded) -> Portion:
    sizes = np.array(found.sizes, dtype=np.int64)
    starts = np.full(len(batches), -1, dtype=np.int64)
    starts[np.isin(batches, found.batches)] = np.cumsum(sizes) - sizes
    columns = {name: found.rows.column(name).to_numpy().astype(np.float32, copy=False) for name in names}
    return Portion(starts, columns)
