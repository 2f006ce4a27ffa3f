"""`Cubes`: a table as one array `[steps, places]` for each column, of all sessions and ranks.

A column is read when it is first asked for, and then read on from the first step that changed. What several
ranks wrote of the same head comes to what `merge_table` makes of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from entropy_monitor.records import ABOVE_FLOOR, LEVELLED, LEVELS, SHARE, Table
from entropy_monitor.store.column_file import ColumnFile, Record

Floats = npt.NDArray[np.float32]
End = Literal["mean", "low", "high"]

MOST_CELLS = 16_000_000
"""Rows of a run from which blocks are shown in the place of records, where the run keeps them."""

_MOST_ARRAY_BYTES = 768_000_000
"""Of all columns kept in memory; the least recently used is dropped."""

_AT_ONCE = 16
"""Batches that are decoded before what they hold is put in place."""

_SUFFIX = {"mean": "", "low": "_low", "high": "_high"}
_BASES = {SHARE: ("entropy", "max_entropy"), ABOVE_FLOOR: ("entropy", "floor_row")}
_PRESENT = "present"


@dataclass(frozen=True, order=True)
class Place:
    """What a column of a cube is of: a head of one call of a layer; of the whole layer, head is -1."""

    layer: str
    call: int
    head: int


@dataclass(frozen=True)
class Source:
    """What one rank of one session wrote of a table.

    Attributes:
        session: from 0.
        rank: of the process.
        group: the lowest of the ranks that worked on the same sequences.
        file: its rows.
        blocks: its blocks (`records.LEVELS`), where it keeps any.
        end: the first step that is not its own any more; None where it owns all.
        left_out: layers whose rows are not to be merged with those of lower ranks.
    """

    session: int
    rank: int
    group: int
    file: ColumnFile
    blocks: ColumnFile | None = None
    end: int | None = None
    left_out: frozenset[str] = frozenset()


@dataclass
class _Part:
    """Records of one file of a source that count."""

    source: Source
    file: ColumnFile
    is_blocks: bool
    records: list[Record]


@dataclass
class _Kept:
    """A column as far as it was read: `values[:valid]` are as they will stay."""

    values: npt.NDArray[Any]
    valid: int = 0


class Cubes:
    """A table's columns as arrays; follows files that grow.

    Attributes:
        steps: `[S]`, int64, ascending: the measured steps, or the first steps of blocks of them.
        places: what the columns of an array are of, in the order of execution.
        measured: how many steps were measured.
        stride: which steps are shown: every one, or every second, fourth, … of a long run without blocks.
    """

    def __init__(self, table: Table, most_cells: int = MOST_CELLS) -> None:
        self.steps: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self.places: list[Place] = []
        self.measured = 0
        self.stride = 1
        self._table = table
        self._most_cells = most_cells
        self._rules = {column.name: column.merge for column in (*table.columns, *LEVELS.columns)}
        self._strict = {column.name for column in table.columns if not column.nullable}
        self._parts: list[_Part] = []
        self._signature: Any = None
        self._kept: dict[str, _Kept] = {}
        self._columns: dict[tuple[int, int], npt.NDArray[np.intp]] = {}

    @property
    def in_blocks(self) -> bool:
        """Whether steps stand for blocks of measured steps."""
        return any(part.is_blocks for part in self._parts)

    def update(self, sources: Sequence[Source]) -> None:
        """Takes in what the sources' files hold now."""
        cells = sum(record.rows for source in sources for record in source.file.records)
        parts = list(_parts(sources, in_blocks=cells > self._most_cells))
        signature = [
            (id(p.source.file), id(p.file), p.source.end, p.source.left_out, p.source.group) for p in parts
        ]
        changed_from = self._first_change(parts) if signature == self._signature else None
        places = self._placed(parts)
        if places != self.places:
            changed_from = None
        self._parts, self._signature, self.places = parts, signature, places
        steps = np.unique(np.array([r.step for p in parts for r in p.records], dtype=np.int64))
        own = [r.step for s in sources for r in s.file.records if s.end is None or r.step < s.end]
        self.measured = len(set(own))
        shown = sum(record.rows for part in parts for record in part.records)
        stride = 1
        while shown / stride > 4 * self._most_cells:
            stride *= 2
        if stride != self.stride:
            changed_from = None
        self.stride, self.steps = stride, steps[::stride]
        if changed_from is None:
            self._kept.clear()
            self._columns.clear()
        else:
            valid = int(np.searchsorted(self.steps, changed_from))
            for kept in self._kept.values():
                kept.valid = min(kept.valid, valid)

    def column(self, name: str, of: End = "mean") -> Floats:
        """`[S, places]` of a figure of the table, or of `entropy_share` or `above_floor`.

        Args:
            name: of the column.
            of: of blocks, their mean, least or largest value; of single steps all three are one.

        Returns:
            float32, read-only; NaN where it is not known, or where nothing was read.
        """
        if not self.in_blocks:
            return self._derived(name) if name in _BASES else self._read([name])[0]
        if name not in LEVELLED:
            return self._read([name])[0]
        ends = [name + suffix for suffix in _SUFFIX.values()]  # at once: batches are small and many
        return self._read(ends)[list(_SUFFIX).index(of)]

    def columns(self, names: Sequence[str], of: End = "mean") -> list[Floats]:
        """Several columns at once, which is quicker than one after the other."""
        if self.in_blocks:
            self._read([name + suffix for name in names for suffix in _SUFFIX.values()])
        else:
            bases = [base for name in names for base in _BASES.get(name, (name,))]
            self._read(list(dict.fromkeys(bases)))
        return [self.column(name, of) for name in names]

    def present(self) -> npt.NDArray[np.bool_]:
        """`[S, places]`: where something was read."""
        return ~np.isnan(self._read([_PRESENT])[0])

    def broken_steps(self, place: int) -> npt.NDArray[np.int64]:
        """The steps at which a head's entropy was read and not finite; of blocks, their first steps."""
        entropy = self.column("entropy")[:, place]
        broken = self.present()[:, place] & ~np.isfinite(entropy)
        if self.in_blocks:
            broken |= self.column("broken")[:, place] > 0
        found: npt.NDArray[np.int64] = self.steps[broken]
        return found

    def known(self, names: Sequence[str]) -> set[str]:
        """Which of these columns hold a figure; of long runs the first and last batch of each file tell."""
        if len(self.steps) * len(self.places) <= self._most_cells // 16:
            columns = self.columns(names, "high")
            return {n for n, values in zip(names, columns, strict=True) if np.isfinite(values).any()}
        found: set[str] = set()
        for part in self._parts:
            wanted = _wanted(part, names)
            bases = list(dict.fromkeys(base for of_name in wanted.values() for base in of_name))
            batches = sorted({record.batch for record in part.records})
            for batch in dict.fromkeys([*batches[:1], *batches[-1:]]):
                values = part.file.read(bases, batch) or {}
                made = {name: _made(name, values, of_name) for name, of_name in wanted.items()}
                found |= {n for n, column in made.items() if column is not None and np.isfinite(column).any()}
        return found

    def _first_change(self, parts: Sequence[_Part]) -> int | None:
        """The first step of which something is new; None where all is to be read again."""
        changed: list[int] = [int(self.steps[-1]) + 1] if len(self.steps) else []
        for old, new in zip(self._parts, parts, strict=True):
            same = len(old.records)
            if old.records != new.records[:same]:
                if not (old.source.blocks is not None and not old.is_blocks):
                    return None
                # The first of the records that follow the last block are in a block now.
                changed.append(min(r.step for r in [*old.records, *new.records]))
            changed += [record.step for record in new.records[same:]]
        return min(changed, default=None)

    def _placed(self, parts: Sequence[_Part]) -> list[Place]:
        """All places, in the order of execution."""
        index: dict[Place, int] = {}
        for part in parts:
            for order in dict.fromkeys(record.order for record in part.records):
                rows = part.file.orders[order]
                for place, at in zip(_places(rows), rows["layer_index"].to_pylist(), strict=True):
                    if place.layer not in part.source.left_out:
                        index[place] = min(at, index.get(place, at))
        return sorted(index, key=lambda place: (index[place], place))

    def _derived(self, name: str) -> Floats:
        one, other = self._read(list(_BASES[name]))
        kept = self._kept.setdefault(name, _Kept(np.empty((0, len(self.places)), np.float32)))
        start = min(kept.valid, len(self.steps))
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            if name == SHARE:
                made = np.where(other[start:] > 0, one[start:] / other[start:], np.float32(np.nan))
            else:
                made = one[start:] - other[start:]
        return self._keep(kept, start, made)

    def _read(self, names: Sequence[str]) -> list[Floats]:
        """Columns as far as they are there; of blocks under their names in `records.LEVELS`."""
        empty = np.empty((0, len(self.places)), np.float32)
        kept = {name: self._kept.setdefault(name, _Kept(empty)) for name in names}
        lacking: dict[int, list[str]] = {}
        for name in names:
            if kept[name].valid < len(self.steps):
                lacking.setdefault(kept[name].valid, []).append(name)
        for start, wanted in lacking.items():
            for name, values in self._assemble(wanted, start).items():
                self._keep(kept[name], start, values)
        for name in names:  # the most recently used ones stand last
            self._kept[name] = self._kept.pop(name, kept[name])
        self._make_room()
        return [_read_only(kept[name].values[: len(self.steps)]) for name in names]

    def _keep(self, kept: _Kept, start: int, values: Floats) -> Floats:
        """Puts what was read from step `start` on behind what is kept."""
        count = len(self.steps)
        if start == 0:
            kept.values = values
        elif len(kept.values) < count:
            grown = np.empty((count + count // 4, len(self.places)), np.float32)
            grown[:start] = kept.values[:start]
            kept.values = grown
        if start > 0:
            kept.values[start:count] = values
        kept.valid = count
        return _read_only(kept.values[:count])

    def _make_room(self) -> None:
        while len(self._kept) > 1 and sum(k.values.nbytes for k in self._kept.values()) > _MOST_ARRAY_BYTES:
            del self._kept[next(iter(self._kept))]

    def _assemble(self, names: Sequence[str], start: int) -> dict[str, Floats]:
        """`[S - start, places]` of each column, merged over ranks."""
        shape = len(self.steps) - start, len(self.places)
        whole = {name: np.full(shape, np.nan, np.float32) for name in names}
        for session in sorted({part.source.session for part in self._parts}):
            own = [part for part in self._parts if part.source.session == session]
            groups = sorted({part.source.group for part in own})
            if len({part.source.rank for part in own}) == 1:
                self._fill(own, names, start, whole)
                continue
            of_groups = [
                self._of_group([p for p in own if p.source.group == group], names, start, shape)
                for group in groups
            ]
            for name in names:
                merged, there = self._merge(name, of_groups)
                whole[name][there] = merged[there]
        return whole

    def _of_group(
        self, parts: Sequence[_Part], names: Sequence[str], start: int, shape: tuple[int, int]
    ) -> dict[str, Floats]:
        """What ranks that read the same sequences read: of a head, the lowest one's."""
        found: dict[str, Floats] = {}
        for rank in sorted({part.source.rank for part in parts}):
            own = [part for part in parts if part.source.rank == rank]
            of_rank = {n: np.full(shape, np.nan, np.float32) for n in {*names, *self._weights(), _PRESENT}}
            self._fill(own, list(of_rank), start, of_rank)
            if not found:
                found = of_rank
                continue
            new = np.isnan(found[_PRESENT])
            for name, values in of_rank.items():
                if self._rules.get(name) == "same":
                    np.fmax(found[name], values, out=found[name])
                else:
                    found[name][new] = values[new]
        return found

    def _weights(self) -> tuple[str, ...]:
        return ("rows_read",) if "rows_read" in self._table.names else ()

    def _merge(self, name: str, groups: Sequence[dict[str, Floats]]) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """One column of several groups of ranks, and where any of them read something."""
        there = [~np.isnan(group[_PRESENT]) for group in groups]
        anywhere = np.logical_or.reduce(there)
        if name == _PRESENT:
            return np.where(anywhere, np.float32(1), np.float32(np.nan)), anywhere
        values = [group[name] for group in groups]
        rule = self._rules.get(name, "mean")
        alone = np.add.reduce(there, dtype=np.int64) == 1
        single = np.add.reduce([np.where(t, v, 0) for v, t in zip(values, there, strict=True)])
        if rule in ("max", "same"):
            if name in self._strict:
                merged = np.maximum.reduce(
                    [np.where(t, v, -np.inf) for v, t in zip(values, there, strict=True)]
                )
            else:
                merged = np.fmax.reduce(values)
        elif rule == "sum":
            merged = single
        else:
            weights = [
                np.where(t, g["rows_read"], 0).astype(np.float64) if self._weights() else t.astype(np.float64)
                for g, t in zip(groups, there, strict=True)
            ]
            with np.errstate(invalid="ignore", divide="ignore"):
                terms = [np.where(w > 0, w * v, 0) for w, v in zip(weights, values, strict=True)]
                total = np.sum(weights, axis=0)
                if rule == "error":
                    merged = np.sqrt(np.sum([term**2 for term in terms], axis=0)) / total
                else:
                    merged = np.sum(terms, axis=0) / total
        result: Floats = np.asarray(np.where(alone, single, merged), dtype=np.float32)
        return result, anywhere

    def _fill(
        self, parts: Sequence[_Part], names: Sequence[str], start: int, into: dict[str, Floats]
    ) -> None:
        """Writes what one rank read into the columns, in the order of writing."""
        figures = [name for name in names if name != _PRESENT]
        for part in parts:
            at = np.searchsorted(self.steps, [record.step for record in part.records])
            shown: dict[int, list[tuple[Record, int]]] = {}
            for record, place in zip(part.records, at.tolist(), strict=True):
                if start <= place < len(self.steps) and self.steps[place] == record.step:
                    shown.setdefault(record.batch, []).append((record, place - start))
            wanted = _wanted(part, figures)
            read = dict.fromkeys(base for bases in wanted.values() for base in bases)
            for batch, values in _batches(part.file, list(read), list(shown)):
                made = {name: _made(name, values, bases) for name, bases in wanted.items()}
                if values or not wanted:
                    self._place(part, shown[batch], made, into)

    def _place(
        self,
        part: _Part,
        records: Sequence[tuple[Record, int]],
        made: dict[str, Floats | None],
        into: dict[str, Floats],
    ) -> None:
        """Writes the records of a batch where they belong: (record, place of its step)."""
        (first, at), (last, to) = records[0], records[-1]
        columns, kept = self._columns_of(part, first.order)
        count = len(records)
        if (
            kept is None
            and to - at == count - 1 == (last.first - first.first) // max(first.rows, 1)
            and {(r.order, r.rows) for r, _ in records} == {(first.order, first.rows)}
        ):  # the usual case, a hundred times as quick: one step after another
            for name, values in made.items():
                if values is not None:
                    block = values[first.first : last.first + last.rows].reshape(count, first.rows)
                    into[name][at : to + 1, columns] = block
            if _PRESENT in into:
                into[_PRESENT][at : to + 1, columns] = 1
            return
        for record, place in records:
            columns, kept = self._columns_of(part, record.order)
            if _PRESENT in into:
                into[_PRESENT][place, columns] = 1
            for name, values in made.items():
                if values is not None:
                    own = values[record.first : record.first + record.rows]
                    into[name][place, columns] = own if kept is None else own[kept]

    def _columns_of(self, part: _Part, order: int) -> tuple[Any, npt.NDArray[np.bool_] | None]:
        """Where the rows of an order stand among the places, and which of them count (None: all)."""
        key = id(part.file), order
        left_out = part.source.left_out
        rows = part.file.orders[order]
        kept = None
        if left_out:
            kept = np.array([layer not in left_out for layer in rows["layer"].to_pylist()], dtype=bool)
        if key not in self._columns:
            index = {place: i for i, place in enumerate(self.places)}
            found = [index[place] for place in _places(rows) if place.layer not in left_out]
            self._columns[key] = np.array(found, dtype=np.intp)
        columns = self._columns[key]
        in_line = len(columns) > 0 and (np.diff(columns) == 1).all()
        return (slice(int(columns[0]), int(columns[-1]) + 1) if in_line else columns), kept


def _parts(sources: Sequence[Source], *, in_blocks: bool) -> Iterator[_Part]:
    """The records that count: those before a session's end and, of long runs, blocks as far as they reach."""
    for source in sources:
        records = [r for r in source.file.records if source.end is None or r.step < source.end]
        if in_blocks and source.blocks is not None and source.blocks.records:
            reach = source.blocks.first_values("until")
            whole = [
                (block, until)
                for block, until in zip(source.blocks.records, reach, strict=True)
                if source.end is None or until < source.end
            ]
            yield _Part(source, source.blocks, True, [block for block, _ in whole])
            last = max((until for _, until in whole), default=None)
            records = [r for r in records if last is None or r.step > last]
        yield _Part(source, source.file, False, records)


def _wanted(part: _Part, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """For each column, those of the file that it is made of: of a single step all ends of it are one."""
    if part.is_blocks:
        return {name: (name,) for name in names}
    figures = {name: name.removesuffix("_low").removesuffix("_high") for name in names}
    return {name: _BASES.get(figure, (figure,)) for name, figure in figures.items()}


def _made(name: str, values: dict[str, Floats], bases: tuple[str, ...]) -> Floats | None:
    if any(base not in values for base in bases):
        return None
    if len(bases) == 1:
        return values[bases[0]]
    one, other = (values[base] for base in bases)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if name.startswith(SHARE):
            share: Floats = np.where(other > 0, one / other, np.float32(np.nan))
            return share
        return one - other


def _batches(
    file: ColumnFile, names: Sequence[str], batches: Sequence[int]
) -> Iterator[tuple[int, dict[str, Floats]]]:
    """Columns of batches in turn; two threads decode, which lets go of the interpreter's lock."""
    if len(batches) < 4 or not names:
        for batch in batches:
            yield batch, (file.read(names, batch) if names else {}) or {}
        return
    with ThreadPoolExecutor(2) as pool:
        for start in range(0, len(batches), _AT_ONCE):
            some = batches[start : start + _AT_ONCE]
            for batch, values in zip(some, pool.map(lambda b: file.read(names, b), some), strict=True):
                yield batch, values or {}


def _places(rows: dict[str, pa.Array]) -> list[Place]:
    count = len(rows["layer"])
    calls = rows["call"].to_pylist() if "call" in rows else [0] * count
    heads = rows["head"].to_pylist() if "head" in rows else [-1] * count
    return [Place(*place) for place in zip(rows["layer"].to_pylist(), calls, heads, strict=True)]


def _read_only(values: Floats) -> Floats:
    shown = values.view()
    shown.flags.writeable = False
    return shown
