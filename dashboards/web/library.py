"""The runs below a folder: found while they appear, read when they are asked for, and kept."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from entropy_monitor.dashboards.run_view import RunView
from entropy_monitor.errors import EntropyMonitorError, RunDirectoryError
from entropy_monitor.store import find_runs

logger = logging.getLogger("entropy_monitor")

_QUICK_SEARCH = 0.05
"""Seconds; a search that takes longer, on a slow file system, is done again after twenty times as long."""
_MOST_OPEN = 16
_MOST_ROWS = 40_000_000
"""Runs, and head rows of runs, whose tables stay in memory (some 20 bytes a row). Of others the card is kept,
and they are read again when they are asked for."""

T = TypeVar("T")
Card = dict[str, Any]


class UnknownRunError(LookupError):
    """No run of this id was found below the folder."""


@dataclass
class _Shelf:
    """One run: where it is, and what is known of it. All but `card` is used under its lock."""

    id: str
    path: Path
    lock: threading.Lock = field(default_factory=threading.Lock)
    view: RunView | None = None
    card: Card | None = None
    files: object = None
    """The names, sizes and times of its files when it was last read."""
    read_at: float = float("-inf")
    used_at: float = float("-inf")


class Library:
    """The runs at and below a folder. Any number of threads may ask.

    A run is a folder that holds `run.json`. Links are not followed, so that nothing outside of the folder is
    read; and whatever id a request names is only ever looked up among the runs that were found.

    Args:
        root: the folder; it may be a run itself, and need not exist yet.
        refresh: seconds for which what was read counts as fresh.
    """

    def __init__(self, root: str | os.PathLike[str], *, refresh: float = 2.0) -> None:
        self._root = Path(root)
        self._refresh = refresh
        self._lock = threading.Lock()
        self._shelves: dict[str, _Shelf] = {}
        self._search_after = float("-inf")

    @property
    def folder(self) -> str:
        """The folder, as a person would name it."""
        return str(self._root.resolve())

    def cards(self, patience: float = 1.0, stop: threading.Event | None = None) -> list[Card]:
        """What `RunView.card` says of every run, in the order of their ids, each with its `id`.

        Args:
            patience: seconds after which runs that were never read are left for the next call; these have
                a card with `pending`.
            stop: leaves them likewise once it is set.
        """
        until = time.monotonic() + patience
        shelves = self._found()
        for shelf in sorted(shelves, key=lambda s: s.read_at):
            # A run that another request is reading right now is not waited for.
            if shelf.lock.acquire(blocking=False):
                try:
                    self._look_at(shelf)
                finally:
                    shelf.lock.release()
                _put_away(shelves)
            if time.monotonic() > until or (stop is not None and stop.is_set()):
                break
        return [{"id": shelf.id, **(shelf.card or _not_read_yet(shelf))} for shelf in shelves]

    def ask(self, run_id: str, question: Callable[[RunView], T]) -> T:
        """What a run's view answers, read anew if it was not just now.

        Raises:
            UnknownRunError: no run of that id was found.
            RunDirectoryError: the run cannot be read.
        """
        shelf = self._shelves.get(run_id) or {s.id: s for s in self._found()}.get(run_id)
        if shelf is None:
            raise UnknownRunError(run_id)
        with shelf.lock:
            shelf.used_at = time.monotonic()
            if shelf.view is None or not self._is_fresh(shelf):
                _read(shelf)
            if shelf.view is None:
                raise RunDirectoryError(str(shelf.card and shelf.card["problem"]))
            return question(shelf.view)

    def _look_at(self, shelf: _Shelf) -> None:
        """Bring a run's card up to date. The caller holds the shelf's lock."""
        if self._is_fresh(shelf):
            return
        done = shelf.card is not None and not shelf.card.get("is_live")
        if done and shelf.files == _files(shelf.path):
            shelf.read_at = time.monotonic()
        else:
            _read(shelf)

    def _is_fresh(self, shelf: _Shelf) -> bool:
        return time.monotonic() - shelf.read_at < self._refresh

    def _found(self) -> list[_Shelf]:
        """All runs by id, searched for anew now and then."""
        with self._lock:
            began = time.monotonic()
            if began >= self._search_after:
                paths = {run_id(self._root, path): path for path in find_runs(self._root)}
                known = self._shelves
                self._shelves = {name: known.get(name) or _Shelf(name, paths[name]) for name in sorted(paths)}
                took = time.monotonic() - began
                self._search_after = began + max(self._refresh, 20 * took if took > _QUICK_SEARCH else 0)
            return list(self._shelves.values())


def run_id(root: Path, path: Path) -> str:
    """How a run is called in requests: its path below `root`, `.` for `root` itself.

    Bytes of a name that are no UTF-8, which no browser would send back, are written in hexadecimal.
    """
    return os.fsencode(path.relative_to(root).as_posix()).decode("utf-8", "backslashreplace")


def _read(shelf: _Shelf) -> None:
    """Read what was added to a run; where that fails, its card says so and there is no view."""
    shelf.files = _files(shelf.path)  # first: what is written while it is read is seen next time
    try:
        view = shelf.view or RunView(shelf.path)
        view.refresh()
        card = view.card()
    except EntropyMonitorError as error:
        view, card = None, _problem(shelf, str(error))
    except Exception as error:
        logger.exception("entropy-monitor: the run in %s cannot be shown", shelf.path)
        view, card = None, _problem(shelf, f"reading it failed ({type(error).__name__}); the log says more")
    # A view that was put away and made again counts anew; the files tell what it has read.
    version = zlib.crc32(repr(shelf.files).encode("utf-8", "surrogateescape"))
    shelf.view, shelf.card = view, {**card, "version": f"{card['version']}-{version:08x}"}
    shelf.read_at = time.monotonic()


def _files(folder: Path) -> list[tuple[str, int, int]]:
    """The names, sizes and times of change of a folder's files."""
    found = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_file(follow_symlinks=False):
                state = entry.stat(follow_symlinks=False)
                found.append((entry.name, state.st_size, state.st_mtime_ns))
    return sorted(found)


def _not_read_yet(shelf: _Shelf) -> Card:
    return {"name": shelf.path.name, "verdict": "unknown", "version": "", "problem": None, "pending": True}


def _problem(shelf: _Shelf, text: str) -> Card:
    return {"name": shelf.path.name, "verdict": "unknown", "version": "0", "problem": text}


def _put_away(shelves: Sequence[_Shelf]) -> None:
    """Let go of the tables of runs that were not asked for lately, those that are over first."""
    opened = [shelf for shelf in shelves if shelf.view is not None]
    opened.sort(key=lambda s: (bool(s.card and s.card.get("is_live")), s.used_at), reverse=True)
    rows = 0
    for i, shelf in enumerate(opened):
        rows += shelf.card.get("heads", 0) * shelf.card.get("measured", 0) if shelf.card else 0
        if i > 0 and (i >= _MOST_OPEN or rows > _MOST_ROWS) and shelf.lock.acquire(blocking=False):
            shelf.view = None
            shelf.lock.release()
