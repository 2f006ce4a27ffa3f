"""`FollowedRun`: a run by columns: what pages read, again and again, while it grows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from entropy_monitor.records import HEADS, LAYERS, LEVELS, SCALARS, AlertEvent, Table
from entropy_monitor.store import copies
from entropy_monitor.store.codec import arrow_schema
from entropy_monitor.store.column_file import ColumnFile
from entropy_monitor.store.cubes import MOST_CELLS, Cubes, Source
from entropy_monitor.store.directory_reading import (
    groups_of,
    latest_plan,
    read_event_logs,
    read_info,
    read_plans,
    run_files_of,
)
from entropy_monitor.store.layout import RunFile
from entropy_monitor.store.merge import Part, ends_of, merge_events, merge_table
from entropy_monitor.store.tables import StreamReader, conform

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
        problems: what could not be read, in words.
        has_ended: whether every rank of the last session ended its files in order.
        written: when something was written last, seconds since the epoch.

    Raises:
        RunDirectoryError: there is no run at `run_dir`, or one of a newer format.
    """

    def __init__(self, run_dir: str | os.PathLike[str], *, most_cells: int = MOST_CELLS) -> None:
        self.path = Path(run_dir)
        self._columns: dict[Path, ColumnFile] = {}
        self._streams: dict[Path, StreamReader] = {}
        self._signature: Any = None
        self.heads = Cubes(HEADS, most_cells)
        self.layers = Cubes(LAYERS, most_cells)
        self.scalars: Scalars = {}
        self.events: Sequence[AlertEvent] = ()
        self.info: Mapping[str, Any] = {}
        self.plan: Mapping[str, Any] = {}
        self.problems: Sequence[str] = ()
        self.has_ended = False
        self.written = 0.0
        self.refresh()

    def refresh(self) -> bool:
        """Reads what was added since; whether there was anything.

        Raises:
            RunDirectoryError: the run is there no more, or has a newer format.
        """
        files = run_files_of(self.path)
        stats = {file.path: file.path.stat() for file in files}
        signature = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()]
        if signature == self._signature:
            return False
        problems: list[str] = []
        self.info = read_info(self.path, problems)
        plans = read_plans(files, problems)
        groups = groups_of(plans)
        self.plan = latest_plan(plans)
        heads, layers, levels = (self._polled(table, files, problems) for table in (HEADS, LAYERS, LEVELS))
        scalars = self._scalar_parts(files, problems)
        ends = ends_of(_first_steps([heads, layers], scalars))
        others = self._strangers(heads, layers)
        problems += copies.in_words(others)
        self.heads.update(_sources(heads, groups, ends, others, levels))
        self.layers.update(_sources(layers, groups, ends, others))
        self.scalars = _by_name(merge_table(SCALARS, scalars, ends))
        self.events = merge_events(copies.events_without(read_event_logs(files, problems), others), ends)
        if self.heads.stride > 1:
            problems.append(
                f"this run is long and was kept without blocks to look at: one of "
                f"{self.heads.stride} measured steps is shown"
            )
        self.problems = problems
        self.written = max((stat.st_mtime for stat in stats.values()), default=0.0)
        last = max((file.session for file in files), default=0)
        readers: list[ColumnFile | StreamReader] = [*self._columns.values(), *self._streams.values()]
        ended = [reader.closed for reader in readers if _session(files, reader) == last]
        self.has_ended = bool(ended) and all(ended)
        self._signature = signature
        return True

    def _polled(self, table: Table, files: Sequence[RunFile], problems: list[str]) -> dict[_Key, ColumnFile]:
        """The files of a table, with what was added to them."""
        found = {}
        for file in files:
            if file.kind != table.name:
                continue
            columns = self._columns.setdefault(file.path, ColumnFile(file.path, table))
            try:
                columns.poll()
            except OSError as error:
                problems.append(f"{file.path.name} cannot be read: {error}")
                continue
            problems += columns.problems
            found[file.session, file.rank] = columns
        return found

    def _scalar_parts(self, files: Sequence[RunFile], problems: list[str]) -> list[Part]:
        parts = []
        for file in files:
            if file.kind != SCALARS.name:
                continue
            stream = self._streams.setdefault(file.path, StreamReader(file.path, SCALARS))
            try:
                parts.append(Part(file.session, file.rank, stream.poll()))
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
                own = {key: file for key, file in files.items() if key[0] == session and file.records}
                if len(own) < 2:
                    continue
                steps = [{record.step for record in file.records} for file in own.values()]
                common = set.intersection(*steps)
                looked_at = {min(common), max(common)} if common else set()
                for (_, rank), file in own.items():
                    rows = _rows_at(table, file, looked_at)
                    parts.setdefault(table.name, []).append(Part(session, rank, rows))
        return copies.strangers(parts)


def _rows_at(table: Table, file: ColumnFile, steps: set[int]) -> pa.Table:
    schema = arrow_schema(table)
    found = []
    for record in [record for record in file.records if record.step in steps]:
        rows = file.rows(record.batch)
        if rows is not None:
            found.append(conform(rows, schema).slice(record.first, record.rows))
    return pa.Table.from_batches(found, schema=schema)


def _first_steps(tables: Sequence[Mapping[_Key, ColumnFile]], scalars: Sequence[Part]) -> dict[int, int]:
    """The first step of each session, of any table."""
    steps = [(s, r.step) for files in tables for (s, _), file in files.items() for r in file.records]
    steps += [(p.session, int(p.rows["step"].to_numpy().min())) for p in scalars if p.rows.num_rows]
    first: dict[int, int] = {}
    for session, step in steps:
        first[session] = min(step, first.get(session, step))
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


def _session(files: Sequence[RunFile], reader: ColumnFile | StreamReader) -> int | None:
    return next((file.session for file in files if file.path == reader.path), None)
