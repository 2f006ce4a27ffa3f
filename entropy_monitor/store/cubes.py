"""`Cubes`: a table as one array `[steps, places]` for each column, of all sessions and ranks.

A column is read when it is first asked for, and then read on from the first step that changed. What several
ranks wrote of the same head comes to what `merge_table` makes of it.

Blocks of several ranks are merged end by end, as records would be: the mean of their means, the mean of their
least values, …. So the ends of a block enclose the merged readings, and may lie beyond them where the ranks'
extremes fell on different steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from entropy_monitor.errors import RunDirectoryError
from entropy_monitor.records import LEVELLED, Table
from entropy_monitor.store.assembly import DERIVED, THERE, Assembly, Floats, bases_of, combined
from entropy_monitor.store.held_records import Ints
from entropy_monitor.store.kept_arrays import KeptArrays
from entropy_monitor.store.places import Place
from entropy_monitor.store.sources import Part, Source, first_change, parts_of

End = Literal["mean", "low", "high"]

MOST_CELLS = 16_000_000
"""Rows of a run from which blocks are shown in the place of records, where the run keeps them."""

MOST_BATCHES = 12_000
"""Batches from which they are too, unless the rows are few: one by one, small batches are slow to read."""

_FEW = 8
"""Rows are few while they are less than this part of the cells."""

_SURELY = 2048
"""Batches up to which `known` looks at all of them, where rows are few."""

_SUFFIX = {"mean": "", "low": "_low", "high": "_high"}


class Cubes:
    """A table's columns as arrays; follows files that grow.

    Args:
        table: which one.
        most_cells: rows from which blocks are shown in the place of records.

    Attributes:
        steps: `[S]`, int64, ascending: the measured steps, or the first steps of blocks of them.
        places: what the columns of an array are of, in the order of execution.
        measured: how many steps were measured.
        last: the last step that was measured, None where there is none.
        stride: which steps are shown: every one, or every second, fourth, … of a long run without blocks.
    """

    def __init__(self, table: Table, most_cells: int = MOST_CELLS) -> None:
        self.steps: Ints = np.empty(0, np.int64)
        self.places: list[Place] = []
        self.measured = 0
        self.last: int | None = None
        self.stride = 1
        self._table = table
        self._most_cells = most_cells
        self._parts: list[Part] = []
        self._identity: Any = None
        self._orders: Any = None
        self._assembly = Assembly(table, self.places)
        self._kept = KeptArrays()

    @property
    def in_blocks(self) -> bool:
        """Whether steps stand for blocks of measured steps."""
        return any(part.is_blocks and len(part.held) for part in self._parts)

    def update(self, sources: Sequence[Source]) -> None:
        """Takes in what the sources' files hold now.

        Raises:
            OSError: blocks cannot be read.
        """
        own = [source.own for source in sources]
        measured = _ascending([held.steps for held in own])
        cells, batches = (
            sum(int(held.rows.sum()) for held in own),
            sum(_distinct(held.batches) for held in own),
        )
        in_blocks = cells > self._most_cells or (batches > MOST_BATCHES and cells > self._most_cells // _FEW)
        parts = list(parts_of(sources, in_blocks=in_blocks))
        shown = sum(int(part.held.rows.sum()) for part in parts)
        stride = 1
        while shown / stride > 4 * self._most_cells:
            stride *= 2
        steps = _ascending([part.held.steps for part in parts])[::stride]
        before, self._parts = self._parts, parts
        self._arrange(before, steps, stride)
        self.steps, self.stride, self.measured = steps, stride, len(measured)
        self.last = int(measured[-1]) if len(measured) else None
        self._assembly.show(parts, steps)

    def column(self, name: str, of: End = "mean") -> Floats:
        """`[S, places]` of a figure of the table, or of `entropy_share` or `above_floor`.

        Args:
            name: of the column.
            of: of blocks, their mean, least or largest value; of single steps all three are one.

        Returns:
            float32, read-only; NaN where it is not known, or where nothing was read.

        Raises:
            RunDirectoryError: a file of the run can be read no more.
        """
        return self.columns([name], of)[0]

    def columns(self, names: Sequence[str], of: End = "mean") -> list[Floats]:
        """Several columns at once, which is quicker than one after the other."""
        if not self.in_blocks:
            found = self._read(names)
            return [found[name] for name in names]
        # All ends of a figure at once: it is they that are asked for next, and batches are small and many.
        ends = {
            name: [name + end for end in _SUFFIX.values()] if name in LEVELLED else [name] for name in names
        }
        found = self._read([end for of_name in ends.values() for end in of_name])
        return [found[name + _SUFFIX[of] if name in LEVELLED else name] for name in names]

    def present(self) -> npt.NDArray[np.bool_]:
        """`[S, places]`: where something was read."""
        return ~np.isnan(self.column(THERE))

    def broken_steps(self, place: int) -> Ints:
        """The steps at which a head's entropy was read and not finite; of blocks, their first steps."""
        entropy = self.column("entropy")[:, place]
        broken = self.present()[:, place] & ~np.isfinite(entropy)
        if self.in_blocks:
            broken |= self.column("broken")[:, place] > 0
        return self.steps[broken]

    def known(self, names: Sequence[str]) -> set[str]:
        """Which of these columns hold a figure; of long runs some batches of each file tell."""
        batches = sum(_distinct(part.held.batches) for part in self._parts)
        if batches <= _SURELY and len(self.steps) * len(self.places) <= self._most_cells // _FEW:
            columns = self.columns(names, "high")
            return {n for n, values in zip(names, columns, strict=True) if np.isfinite(values).any()}
        found: set[str] = set()
        for part in [part for part in self._parts if len(part.held)]:
            made_of = {name: bases for name in names if (bases := bases_of(part, name))}
            needed = list(dict.fromkeys(base for bases in made_of.values() for base in bases))
            values = part.file.read(needed, part.file.batches.sample(np.unique(part.held.batches))).columns
            for name, bases in made_of.items():
                if np.isfinite(combined(name, values, bases)).any():
                    found.add(name)
        return found

    def _arrange(self, before: Sequence[Part], steps: Ints, stride: int) -> None:
        """Finds the places, and what of the arrays still holds."""
        identity = [part.identity for part in self._parts], stride, self.in_blocks
        orders = [np.flatnonzero(np.bincount(part.held.orders)).tolist() for part in self._parts]
        is_other = identity != self._identity
        places = _placed(self._parts) if is_other or orders != self._orders else self.places
        self._identity, self._orders = identity, orders
        if is_other or places != self.places:
            self.places = places
            self._assembly = Assembly(self._table, places)
            self._kept.clear()
            return
        changed = first_change(before, self._parts)
        self._kept.cut(len(steps) if changed is None else int(np.searchsorted(steps, changed)))

    def _read(self, names: Sequence[str]) -> dict[str, Floats]:
        """Columns by name; of blocks under their names in `records.LEVELS`."""
        if not len(self.steps):
            return dict.fromkeys(names, np.empty((0, len(self.places)), np.float32))
        derived = {} if self.in_blocks else {name: DERIVED[name] for name in names if name in DERIVED}
        arrays = {name: self._kept.of(name) for name in names}
        lacking = [name for name in names if arrays[name].valid < len(self.steps)]
        for base in [base for name in lacking for base in derived.get(name, ())]:
            arrays.setdefault(base, self._kept.of(base))
        starts: dict[int, list[str]] = {}
        for name in arrays.keys() - derived.keys():
            if arrays[name].valid < len(self.steps):
                starts.setdefault(arrays[name].valid, []).append(name)
        for start, of_start in starts.items():
            try:
                found = self._assembly.columns(of_start, start)
            except OSError as error:
                raise RunDirectoryError(f"the run can be read no more: {error}") from error
            for name, values in found.items():
                arrays[name].put(start, values)
        for name in [name for name in lacking if name in derived]:
            start = arrays[name].valid
            ends = {base: arrays[base].view()[start:] for base in derived[name]}
            arrays[name].put(start, combined(name, ends, derived[name]))
        self._kept.make_room()
        return {name: arrays[name].view() for name in names}


def _distinct(ascending: Ints) -> int:
    """How many different ones there are."""
    return len(ascending) and int(np.count_nonzero(np.diff(ascending))) + 1


def _ascending(several: Sequence[Ints]) -> Ints:
    """All steps, each once, in order."""
    if len(several) == 1 and (several[0][1:] > several[0][:-1]).all():
        return several[0]
    return np.unique(np.concatenate([np.empty(0, np.int64), *several]))


def _placed(parts: Sequence[Part]) -> list[Place]:
    """All places, in the order of execution; those of a layer side by side."""
    index: dict[str, int] = {}
    found: set[Place] = set()
    for part in parts:
        for order in np.flatnonzero(np.bincount(part.held.orders)).tolist():
            rows = part.file.orders[order]
            for place, at in zip(rows.places, rows.indices, strict=True):
                if place.layer not in part.source.left_out:
                    index[place.layer] = min(at, index.get(place.layer, at))
                    found.add(place)
    return sorted(found, key=lambda place: (index[place.layer], place.layer, place.call, place.head))
