"""Progress bars on stderr: where somebody watches a terminal and tqdm is there, and nowhere else."""

from __future__ import annotations

import sys
import threading
from types import TracebackType
from typing import Any

from entropy_monitor.commands.terminal import fit, out, shown

_DELAY = 0.5  # seconds before a bar shows: what is quick needs none
_NAME = 32  # columns
_TICK = 0.5  # seconds between two updates of the time that has passed


class Progress:
    """A bar over so many steps, whose clock runs while a step takes long.

    Args:
        total: steps.
        quiet: show nothing, whoever watches.
    """

    def __init__(self, total: int, *, quiet: bool = False) -> None:
        self._bar: Any = None
        self._ended = threading.Event()
        self._lock = threading.Lock()
        if quiet or not sys.stderr.isatty():
            return
        try:
            from tqdm import tqdm
        except ImportError:
            return
        self._bar = tqdm(
            total=total,
            leave=False,
            delay=_DELAY,
            file=sys.stderr,
            dynamic_ncols=True,
            bar_format="  {desc} |{bar:20}| {n_fmt} of {total_fmt}, {elapsed}",
        )

    def __enter__(self) -> Progress:
        if self._bar is not None:
            threading.Thread(target=self._tick, name="entropy-monitor progress", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._bar is not None:
            with self._lock:
                self._bar.close()

    def at(self, what: object) -> None:
        """Says what is done now."""
        if self._bar is not None:
            with self._lock:
                self._bar.set_description_str(fit([shown(what)], _NAME)[0], refresh=False)

    def out(self, text: str) -> None:
        """Prints a line to stdout, which may be the terminal that the bar is on."""
        with self._lock:
            if self._bar is not None:
                self._bar.clear()
            out(text)

    def advance(self) -> None:
        """One step is done."""
        if self._bar is not None:
            with self._lock:
                self._bar.update()

    def _tick(self) -> None:
        while not self._ended.wait(_TICK):
            with self._lock:
                self._bar.update(0)
                self._bar.refresh()
