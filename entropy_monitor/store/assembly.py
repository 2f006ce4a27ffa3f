"""`Assembly`: columns of many files as arrays `[steps, places]`, merged over ranks and sessions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from entropy_monitor.records import ABOVE_FLOOR, LEVELS, SHARE, Merge, Table
from entropy_monitor.store.held_records import HeldRecords, Ints
from entropy_monitor.store.places import Place
from entropy_monitor.store.rank_merging import RankMerge
from entropy_monitor.store.sources import Part

Floats: TypeAlias = npt.NDArray[np.float32]

THERE = "layer_index"
"""A column that is known wherever there is a row."""

DERIVED = {SHARE: ("entropy", "max_entropy"), ABOVE_FLOOR: ("entropy", "floor_row")}
"""Figures that are made of two columns (`records.SHARE` and `records.ABOVE_FLOOR` say how)."""


class Assembly:
    """Knows where in an array each row of the files belongs.

    Args:
        table: whose rows these are.
        places: what the columns of the arrays are of.
    """

    def __init__(self, table: Table, places: Sequence[Place]) -> None:
        self._parts: Sequence[Part] = ()
        self._steps: Ints = np.empty(0, np.int64)
        self._places = places
        self._index = {place: i for i, place in enumerate(places)}
        self._columns: dict[tuple[int, int], tuple[Any, npt.NDArray[np.bool_] | None]] = {}
        rules: dict[str, Merge] = {c.name: c.merge or "same" for c in (*LEVELS.columns, *table.columns)}
        self._rules = rules
        self._weight = "rows_read" if "rows_read" in table.names else None
        self._has_copies = all(column.merge in (None, "same") for column in table.columns)

    def show(self, parts: Sequence[Part], steps: Ints) -> None:
        """Sets what is put together.

        Args:
            parts: what counts.
            steps: `[S]`: of the arrays, ascending; what was written at other steps is left out.
        """
        self._parts, self._steps = parts, steps

    def columns(self, names: Sequence[str], start: int) -> dict[str, Floats]:
        """`[S - start, places]` of each column; NaN where it is not known.

        Args:
            names: columns of the table or, of blocks, of `records.LEVELS`.
            start: place of the first step that is wanted.

        Raises:
            OSError: a file cannot be read.
        """
        whole = self._empty(names, slice(start, len(self._steps)))
        for session in sorted({part.source.session for part in self._parts}):
            own = [part for part in self._parts if part.source.session == session and len(part.held)]
            if len({part.source.rank for part in own}) < 2:
                self._fill(own, names, start, whole)
                continue
            ends = [(part.held.steps.min(), part.held.steps.max()) for part in own]
            first = max(start, int(np.searchsorted(self._steps, min(low for low, _ in ends))))
            stop = int(np.searchsorted(self._steps, max(high for _, high in ends), side="right"))
            if first < stop:
                self._merge(
                    own, slice(first, stop), {n: v[first - start : stop - start] for n, v in whole.items()}
                )
        return whole

    def _empty(self, names: Sequence[str], span: slice) -> dict[str, Floats]:
        shape = span.stop - span.start, len(self._places)
        return {name: np.full(shape, np.nan, np.float32) for name in names}

    def _merge(self, parts: Sequence[Part], span: slice, into: Mapping[str, Floats]) -> None:
        """Writes what several ranks of one session read."""
        merge = RankMerge({name: self._rules[name] for name in into})
        needed = list(dict.fromkeys([*into, THERE, *([self._weight] if self._weight else [])]))
        # Where all that is known agrees, copies do no harm, and may know more.
        groups = sorted({part.source.rank if self._has_copies else part.source.group for part in parts})
        for group in groups:
            own = [p for p in parts if group == (p.source.rank if self._has_copies else p.source.group)]
            readings = self._of_group(own, needed, span)
            there = ~np.isnan(readings[THERE])
            weight = readings[self._weight] if self._weight else None
            merge.add({name: readings[name] for name in into}, there, weight)
        for name, values in into.items():
            merge.result_into(name, values)

    def _of_group(self, parts: Sequence[Part], names: Sequence[str], span: slice) -> dict[str, Floats]:
        """What ranks read that worked on the same sequences: of a head, the lowest one's."""
        found: dict[str, Floats] = {}
        for rank in sorted({part.source.rank for part in parts}):
            of_rank = self._empty(names, span)
            self._fill([part for part in parts if part.source.rank == rank], names, span.start, of_rank)
            if not found:
                found = of_rank
                continue
            new = np.isnan(found[THERE]) & ~np.isnan(of_rank[THERE])
            for name, values in of_rank.items():
                found[name][new] = values[new]
        return found

    def _fill(
        self, parts: Sequence[Part], names: Sequence[str], start: int, into: Mapping[str, Floats]
    ) -> None:
        """Writes what one rank read, in the order of writing; step number `start` is the arrays' first."""
        for part in parts:
            at = np.searchsorted(self._steps, part.held.steps)
            shown = (at >= start) & (at < start + len(into[names[0]]))
            shown[shown] = self._steps[at[shown]] == part.held.steps[shown]
            held, at = part.held[shown], at[shown] - start
            made_of = {name: bases for name in names if (bases := bases_of(part, name))}
            needed = list(dict.fromkeys(base for bases in made_of.values() for base in bases))
            for batches, portion in part.file.read_each(needed, np.unique(held.batches)):
                low, high = np.searchsorted(held.batches, [batches[0], batches[-1] + 1])
                starts = portion.starts[np.searchsorted(batches, held.batches[low:high])]
                sound = starts >= 0
                made = {name: combined(name, portion.columns, bases) for name, bases in made_of.items()}
                own = held[low:high][sound]
                self._place(part, own, starts[sound] + own.firsts, at[low:high][sound], made, into)

    def _place(
        self,
        part: Part,
        held: HeldRecords,
        firsts: Ints,
        at: Ints,
        values: Mapping[str, Floats],
        into: Mapping[str, Floats],
    ) -> None:
        """Writes the records `held`, whose rows begin at `firsts`, to the steps `at`."""
        if not len(held):
            return
        # Records of one order whose rows follow each other go in one piece, a hundred times as quick.
        breaks = (np.diff(held.orders) != 0) | (np.diff(held.rows) != 0) | (np.diff(firsts) != held.rows[:-1])
        for piece in np.split(np.arange(len(held)), np.flatnonzero(breaks) + 1):
            columns, kept = self._columns_of(part, int(held.orders[piece[0]]))
            steps = at[piece]
            first, rows = int(firsts[piece[0]]), int(held.rows[piece[0]])
            where: Any = steps[:, None] if isinstance(columns, np.ndarray) else steps
            if (np.diff(steps) == 1).all():
                where = slice(int(steps[0]), int(steps[-1]) + 1)
            for name, column in values.items():
                block = column[first : first + len(piece) * rows].reshape(len(piece), rows)
                into[name][where, columns] = block if kept is None else block[:, kept]

    def _columns_of(self, part: Part, order: int) -> tuple[Any, npt.NDArray[np.bool_] | None]:
        """Where the rows of an order stand among the places, and which of them count (None: all)."""
        key = id(part.file), order
        if key not in self._columns:
            rows, left_out = part.file.orders[order].places, part.source.left_out
            kept = np.array([place.layer not in left_out for place in rows], dtype=bool)
            found = np.array([self._index[p] for p in rows if p.layer not in left_out], dtype=np.intp)
            in_line = len(found) > 0 and (np.diff(found) == 1).all()
            columns = slice(int(found[0]), int(found[-1]) + 1) if in_line else found
            self._columns[key] = columns, None if kept.all() else kept
        return self._columns[key]


def bases_of(part: Part, name: str) -> tuple[str, ...]:
    """The columns of a part's file that a column is made of; empty where it has no such figure."""
    figure = (
        name if part.is_blocks else name.removesuffix("_low").removesuffix("_high")
    )  # of one step all are one
    bases = (figure,) if part.is_blocks else DERIVED.get(figure, (figure,))
    return bases if set(bases) <= set(part.file.table.names) else ()


def combined(name: str, columns: Mapping[str, Floats], bases: Sequence[str]) -> Floats:
    """A column, given those that it is made of."""
    if len(bases) == 1:
        return columns[bases[0]]
    one, other = (columns[base] for base in bases)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if name.startswith(SHARE):
            share: Floats = np.where(other > 0, one / other, np.float32(np.nan))
            return share
        return one - other
