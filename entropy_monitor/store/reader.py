"""`read_run`: everything that is sound in a run directory, and what is not."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from entropy_monitor.records import TABLES, AlertEvent
from entropy_monitor.store import copies
from entropy_monitor.store.directory_reading import (
    groups_of,
    latest_plan,
    read_document,
    read_event_logs,
    read_info,
    read_plans,
    run_files_of,
)
from entropy_monitor.store.layout import RunFile
from entropy_monitor.store.merge import Part, cutoffs, merge_events, merge_table
from entropy_monitor.store.tables import StreamReader


@dataclass(frozen=True)
class Session:
    """One process start of a run.

    Attributes: number: from 0. ranks: which ranks wrote in it. claim: of its lowest rank: when and
        where it started, options and versions; empty where damaged. first_step: first step
        measured, None when there is none. last_step: last step measured. superseded_from: its rows
        from this step on are left out, since a later session went back to it. closed: whether all
        ranks ended their files in order.
    """

    number: int
    ranks: tuple[int, ...]
    claim: Mapping[str, Any]
    first_step: int | None
    last_step: int | None
    superseded_from: int | None
    closed: bool


@dataclass(frozen=True)
class RunData:
    """A run as it lies on disk, its sessions and ranks merged.

    Attributes:
        path: the directory.
        info: of `run.json`: format, created, model, options, versions; empty where damaged.
        plan: what was measured and how, by the latest session that says so.
        heads: table `records.HEADS`, one row for each key, ordered by step, layer, call, head.
        layers: table `records.LAYERS`, ordered by step and layer.
        scalars: table `records.SCALARS`, ordered by step.
        alerts: every change of an alert, in order.
        sessions: in order.
        problems: what could not be read, in words; empty when all is well.
    """

    path: Path
    info: Mapping[str, Any]
    plan: Mapping[str, Any]
    heads: pa.Table
    layers: pa.Table
    scalars: pa.Table
    alerts: Sequence[AlertEvent]
    sessions: Sequence[Session]
    problems: Sequence[str]


def read_run(run_dir: str | os.PathLike[str]) -> RunData:
    """Read a run, also while it is written or after it was damaged.

    Sessions: where a later session measured the same steps, it counts. A restarted process goes
    back to its checkpoint, so all that earlier sessions measured at or after the later one's first
    step is left out (as TensorBoard purges on restart). It stays on disk.

    Ranks: rows of the same key are merged, weighted by `rows_read`; of ranks that worked on the same
    sequences (tensor parallel), one row counts. Heads that are split over ranks come side by side. Rows of
    ranks whose weights are others than those of the lowest rank (tensor parallel without DTensors) are left
    out, and `problems` says so.

    Raises:
        RunDirectoryError: there is no run at `run_dir`, or one of a newer format.
    """
    return RunReader(run_dir).read()


class RunReader:
    """Reads a run again and again; tables are read on from where the last time ended.

    Args:
        run_dir: the directory.

    Raises:
        RunDirectoryError: there is no run at `run_dir`.
    """

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        self.path = Path(run_dir)
        self._streams: dict[Path, StreamReader] = {}
        run_files_of(self.path)

    def read(self) -> RunData:
        """The run as it is now.

        Raises:
            RunDirectoryError: it is there no more, or has a newer format.
        """
        files = run_files_of(self.path)
        problems: list[str] = []
        info = read_info(self.path, problems)
        plans = read_plans(files, problems)
        groups = groups_of(plans)
        parts = {table.name: self._parts(table.name, files, groups, problems) for table in TABLES}
        ends = cutoffs([part for found in parts.values() for part in found])
        others = copies.strangers(parts)
        problems += copies.in_words(others)
        merged = {t.name: merge_table(t, copies.without(parts[t.name], others), ends) for t in TABLES}
        logs = copies.events_without(read_event_logs(files, problems), others)
        return RunData(
            path=self.path,
            info=info,
            plan=latest_plan(plans),
            alerts=merge_events(logs, ends),
            sessions=self._sessions(files, parts, ends, problems),
            problems=problems,
            **merged,
        )

    def _parts(
        self,
        kind: str,
        files: Sequence[RunFile],
        groups: Mapping[tuple[int, int], int],
        problems: list[str],
    ) -> list[Part]:
        (table,) = (table for table in TABLES if table.name == kind)
        parts = []
        for file in files:
            if file.kind != kind:
                continue
            stream = self._streams.setdefault(file.path, StreamReader(file.path, table))
            try:
                group = groups.get((file.session, file.rank))
                parts.append(Part(file.session, file.rank, stream.poll(), group))
            except OSError as error:
                problems.append(f"{file.path.name} cannot be read: {error}")
            problems += stream.problems
        return parts

    def _sessions(
        self,
        files: Sequence[RunFile],
        parts: Mapping[str, Sequence[Part]],
        ends: Mapping[int, int],
        problems: list[str],
    ) -> list[Session]:
        found: dict[int, _Found] = {}
        for file in files:
            seen = found.setdefault(file.session, _Found())
            seen.ranks.add(file.rank)
            if file.path in self._streams:
                seen.ended.append(self._streams[file.path].closed)
            if file.kind == "session":
                claim = read_document(file.path, problems)
                seen.claim = seen.claim or claim
        for part in (part for of_table in parts.values() for part in of_table):
            if part.rows.num_rows:
                steps = part.rows["step"].to_numpy()
                found[part.session].steps += [int(steps.min()), int(steps.max())]
        return [
            Session(
                number=number,
                ranks=tuple(sorted(seen.ranks)),
                claim=seen.claim,
                first_step=min(seen.steps, default=None),
                last_step=max(seen.steps, default=None),
                superseded_from=_superseded(seen.steps, ends.get(number)),
                closed=bool(seen.ended) and all(seen.ended),
            )
            for number, seen in sorted(found.items())
        ]


@dataclass
class _Found:
    ranks: set[int] = field(default_factory=set)
    claim: Mapping[str, Any] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)
    ended: list[bool] = field(default_factory=list)


def _superseded(steps: Sequence[int], end: int | None) -> int | None:
    return end if end is not None and steps and max(steps) >= end else None
