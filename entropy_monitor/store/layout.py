"""Which files a run directory holds, and what they are called."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from entropy_monitor.records import LEVELS, TABLES

FORMAT = 1
"""Version of the run directory's format. A reader refuses what is newer than it knows."""

RUN_FILE = "run.json"

_SUFFIXES: dict[str, str] = {
    **{table.name: "arrows" for table in (*TABLES, LEVELS)},
    "alerts": "jsonl",
    "session": "json",
    "plan": "json",
}
_NAME = re.compile(r"(?P<kind>[a-z]+)-(?P<session>\d+)-(?P<rank>\d+)\.(?P<suffix>[a-z]+)")


@dataclass(frozen=True, order=True)
class RunFile:
    """A file that one rank wrote in one session; the order is session, rank, kind."""

    session: int
    rank: int
    kind: str
    path: Path


def file_path(run_dir: Path, kind: str, session: int, rank: int) -> Path:
    """Where one rank of one session keeps a kind of file, such as `heads-000-000.arrows`.

    Kinds: the names of the tables, `levels`, `alerts`, `session` (the claim: who started it, when, how) and
    `plan`.
    """
    return run_dir / f"{kind}-{session:03d}-{rank:03d}.{_SUFFIXES[kind]}"


def run_files(run_dir: Path) -> list[RunFile]:
    """Every file below `run_dir` that is named like one of ours, in order; others are passed over."""
    found = []
    for path in run_dir.iterdir():
        match = _NAME.fullmatch(path.name)
        if match and _SUFFIXES.get(match["kind"]) == match["suffix"]:
            found.append(RunFile(int(match["session"]), int(match["rank"]), match["kind"], path))
    return sorted(found)
