"""`FollowedRun`: a run by columns: what pages read, again and again, while it grows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from entropy_monitor.errors import RunDirectoryError
from entropy_monitor.records import HEADS, LAYERS, LEVELS, SCALARS, AlertEvent, Table
from entropy_monitor.store import copies
from entropy_monitor.store.column_file import ColumnFile
from entropy_monitor.store.cubes import MOST_CELLS, Cubes
from entropy_monitor.store.directory_reading import (
    groups_of,
    latest_plan,
    read_event_logs,
    read_info,
    read_plans,
    run_files_of,
)
from entropy_monitor.store.layout import RunFile
from entropy_monitor.store.losses import UNFINISHED
from entropy_monitor.store.merge import Part, ends_of, merge_events, merge_table
from entropy_monitor.store.sources import Source
from entropy_monitor.store.tables import StreamReader

Scalars: TypeAlias = dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]]
_Key = tuple[int, int]  # session and rank


class FollowedRun:
    """Reads a run again and again, each time only what was added; figures only when they are asked for.

    What it shows is what `read_run` returns.

    Args:
        run_dir: the directory.
        most_cells: head rows from which blocks are shown in the place of records, where the run keeps them.

    Attributes:
        path: the directory.
        heads: the `heads` table by columns.
        layers: the `layers` table by columns.
        scalars: steps and values of each scalar, by name; of one step's values the last.
        events: every change of an alert, in order.
        info: of `run.json`.
        plan: what was measured and how, by the latest session that says so.
        has_ended: whether every rank of the last session ended its files in order.
        written: when something was written last, seconds since the epoch.

    Raises:
        RunDirectoryError: there is no run at `run_dir`, or one of a newer format.
    """

    def __init__(self, run_dir: str | os.PathLike[str], *, most_cells: int = MOST_CELLS) -> None:
        self.path = Path(run_dir)
        self._columns: dict[Path, ColumnFile] = {}
        self._streams: dict[Path, StreamReader] = {}
        self._seen: Any = None
        self.heads = Cubes(HEADS, most_cells)
        self.layers = Cubes(LAYERS, most_cells)
        self.scalars: Scalars = {}
        self.events: Sequence[AlertEvent] = ()
        self.info: Mapping[str, Any] = {}
        self.plan: Mapping[str, Any] = {}
        self._files: Sequence[ColumnFile] = ()
        self._problems: Sequence[str] = ()
        self._notes: list[str] = []
        self.has_ended = False
        self.written = 0.0
        self.refresh()

    def refresh(self) -> bool:
        """Reads what was added since; whether there was anything.

        A batch that turned out to be damaged when it was read counts too: until then its seal was believed.

        Raises:
            RunDirectoryError: the run is there no more, or has a newer format.
        """
        try:
            files = run_files_of(self.path)
            stats = {file.path: file.path.stat() for file in files}
            sizes = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()]
            if (sizes, self._lost) == self._seen:
                return False
            self._read(files)
        except OSError as error:
            raise RunDirectoryError(f"the run in {self.path} cannot be read: {error}") from error
        self.written = max((stat.st_mtime for stat in stats.values()), default=0.0)
        self._seen = sizes, self._lost
        return True

    @property
    def problems(self) -> list[str]:
        """What could not be read, in words, as far as it is known: see `verify`."""
        return [*self._not_read, *self._notes]

    @property
    def damage(self) -> list[str]:
        """Of these, what will never be read: no ends that are still being written."""
        return [problem for problem in self._not_read if UNFINISHED not in problem]

    def verify(self) -> None:
        """Checks all that the tables hold, also what nobody asked for yet, and leaves out what is damaged.

        Raises:
            RunDirectoryError: the run is there no more.
        """
        try:
            for file in self._files:
                file.batches.verify()
        except OSError as error:
            raise RunDirectoryError(f"the run in {self.path} cannot be read: {error}") from error
        self.refresh()

    @property
    def _not_read(self) -> list[str]:
        return [*self._problems, *(words for file in self._files for words in file.problems)]

    @property
    def _lost(self) -> int:
        return sum(len(file.batches.lost) for file in self._columns.values())

    def _read(self, files: Sequence[RunFile]) -> None:
        problems: list[str] = []
        self.info = read_info(self.path, problems)
        plans = read_plans(files, problems)
        groups = groups_of(plans)
        self.plan = latest_plan(plans)
        heads, layers, levels = (self._polled(table, files, problems) for table in (HEADS, LAYERS, LEVELS))
        scalars = self._scalar_parts(files, groups, problems)
        others = self._strangers(heads, layers)
        ends = ends_of(_first_steps([heads, layers], scalars))
        self.heads.update(_sources(heads, groups, ends, others, levels))
        self.layers.update(_sources(layers, groups, ends, others))
        self.scalars = _by_name(merge_table(SCALARS, scalars, ends))
        self.events = merge_events(copies.events_without(read_event_logs(files, problems), others), ends)
        self._files = [file for of_table in (heads, layers, levels) for file in of_table.values()]
        stride = max(self.heads.stride, self.layers.stride)
        self._problems, self._notes = problems, copies.in_words(others)
        if stride > 1:
            self._notes.append(f"this run is longer than can be shown: one of {stride} of its steps is")
        last = max((file.session for file in files), default=0)
        readers = [
            self._columns.get(file.path) or self._streams.get(file.path)
            for file in files
            if file.session == last
        ]
        ended = [reader.closed for reader in readers if reader is not None]
        self.has_ended = bool(ended) and all(ended)

    def _polled(self, table: Table, files: Sequence[RunFile], problems: list[str]) -> dict[_Key, ColumnFile]:
        """The files of a table, with what was added to them."""
        found = {}
        for file in files:
            if file.kind != table.name:
                continue
            if file.path not in self._columns:
                self._columns[file.path] = ColumnFile(file.path, table)
            columns = self._columns[file.path]
            try:
                columns.poll()
            except OSError as error:
                problems.append(f"{file.path.name} cannot be read: {error}")
                continue
            found[file.session, file.rank] = columns
        return found

    def _scalar_parts(
        self, files: Sequence[RunFile], groups: Mapping[_Key, int], problems: list[str]
    ) -> list[Part]:
        parts = []
        for file in files:
            if file.kind != SCALARS.name:
                continue
            stream = self._streams.setdefault(file.path, StreamReader(file.path, SCALARS))
            try:
                group = groups.get((file.session, file.rank))
                parts.append(Part(file.session, file.rank, stream.poll(), group))
            except OSError as error:
                problems.append(f"{file.path.name} cannot be read: {error}")
            problems += stream.problems
        return parts

    def _strangers(
        self, heads: Mapping[_Key, ColumnFile], layers: Mapping[_Key, ColumnFile]
    ) -> copies.Strangers:
        """Ranks that hold other weights under the same names, at the first and last step of all."""
        parts: dict[str, list[Part]] = {}
        for table, files in ((HEADS, heads), (LAYERS, layers)):
            for session in sorted({session for session, _ in files}):
                own = {key: file for key, file in files.items() if key[0] == session and len(file.held)}
                if len(own) < 2:
                    continue
                common = reduce(np.intersect1d, [file.held.steps for file in own.values()])
                looked_at = sorted({int(common[0]), int(common[-1])}) if len(common) else []
                for (_, rank), file in own.items():
                    rows = file.rows(looked_at)
                    parts.setdefault(table.name, []).append(Part(session, rank, rows))
        return copies.strangers(parts)


def _first_steps(tables: Sequence[Mapping[_Key, ColumnFile]], scalars: Sequence[Part]) -> dict[int, int]:
    """The first step of each session, of any table."""
    steps = [(s, f.held.steps) for files in tables for (s, _), f in files.items() if len(f.held)]
    steps += [(part.session, part.rows["step"].to_numpy()) for part in scalars if part.rows.num_rows]
    first: dict[int, int] = {}
    for session, of_file in steps:
        least = int(of_file.min())
        first[session] = min(least, first.get(session, least))
    return first


def _sources(
    files: Mapping[_Key, ColumnFile],
    groups: Mapping[_Key, int],
    ends: Mapping[int, int],
    others: copies.Strangers,
    blocks: Mapping[_Key, ColumnFile] | None = None,
) -> list[Source]:
    return [
        Source(
            session,
            rank,
            groups.get((session, rank), rank),
            file,
            (blocks or {}).get((session, rank)),
            ends.get(session),
            frozenset(layer for (s, layer), ranks in others.items() if s == session and rank in ranks),
        )
        for (session, rank), file in sorted(files.items())
    ]


def _by_name(rows: pa.Table) -> Scalars:
    steps, values = rows["step"].to_numpy(), rows["value"].to_numpy()
    names = rows["name"].combine_chunks().dictionary_encode()
    codes = names.indices.to_numpy()
    return {
        name: (steps[codes == code], values[codes == code])
        for code, name in enumerate(names.dictionary.to_pylist())
    }
