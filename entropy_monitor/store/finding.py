"""Finds runs: at a folder, and below it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from entropy_monitor.store.layout import RUN_FILE

_DEEPEST = 6
"""Folders between the root and a run."""
_MOST_RUNS = 2000
_MOST_FOLDERS = 20_000
"""Folders looked into in one search, the shallow ones first: a checkpoint store can hold a million."""


def find_runs(root: Path) -> Iterator[Path]:
    """The folders at and below `root` that hold a run, the shallow ones first; links are not followed."""
    level, looked, found = [root], 0, 0
    for _ in range(_DEEPEST + 1):
        below: list[Path] = []
        for folder in level:
            looked += 1
            if looked > _MOST_FOLDERS or found == _MOST_RUNS:
                return
            is_run, inner = _look_into(folder)
            if is_run:
                found += 1
                yield folder
            below += inner
        level = below


def _look_into(folder: Path) -> tuple[bool, list[Path]]:
    """Whether a folder is a run, and the folders in it that are not hidden."""
    is_run, inner = False, []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name == RUN_FILE:
                is_run = entry.is_file(follow_symlinks=False)
            elif not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False):
                inner.append(folder / entry.name)
    return is_run, sorted(inner)
