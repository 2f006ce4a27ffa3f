"""Which runs are meant by the paths of a command line."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from entropy_monitor.store.finding import find_runs
from entropy_monitor.store.layout import RUN_FILE


def run_paths(given: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Run directories: those given, and in the place of a folder that is none all runs below it.

    A path with no run at or below it stays, so that whoever opens it says what is wrong. None comes twice.
    Below a folder links are not followed.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, given):
        below = [] if (path / RUN_FILE).is_file() else sorted(find_runs(path))
        for run in below or [path]:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def names_of(paths: Iterable[Path]) -> list[str]:
    """What runs are called: the directory's name, or the path as given where two share it."""
    paths = list(paths)
    names = [path.resolve().name for path in paths]
    return [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]
