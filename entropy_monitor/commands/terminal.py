"""What is printed: text of runs as text, tables as wide as the terminal, strict JSON."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

_NARROW, _WIDE = 40, 120
_GAP = "  "


def shown(text: object) -> str:
    """Text on one line, that no terminal takes for a command: control and formatting signs are replaced."""
    return _harmless(" ".join(str(text).split()))


def out(text: str = "", *, at_once: bool = False) -> None:
    """Prints lines to stdout; `at_once` where somebody may wait for them."""
    print(text, flush=at_once)


def error(text: object) -> None:
    """Prints one line to stderr, under the program's name."""
    print(f"entropy-monitor: {shown(text)}", file=sys.stderr)


def width() -> int:
    """Columns to fill: those of the terminal, within reason; 100 where there is none."""
    return max(_NARROW, shutil.get_terminal_size((100, 24)).columns)


def wrapped(text: object, indent: str = "", first: str | None = None) -> str:
    """A paragraph in lines that can be read, on wide terminals too.

    Args:
        text: of any origin.
        indent: of every line.
        first: what the first line begins with, instead of `indent`.
    """
    start = indent if first is None else first
    lines = textwrap.wrap(
        shown(text),
        min(width(), _WIDE),
        initial_indent=start,
        subsequent_indent=indent,
        break_on_hyphens=False,
    )
    return "\n".join(lines) or start


def folded(line: str, indent: str) -> str:
    """A line of a table as it is, what does not fit the terminal on lines below, further in."""
    parts = textwrap.wrap(_harmless(line), width(), subsequent_indent=indent, break_on_hyphens=False)
    return "\n".join(parts)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows below a header: the first column to the left and as wide as there is room, others to the right."""
    names = [row[0] for row in rows]
    cells = [list(row[1:]) for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(header[1:], *cells, strict=True)]
    room = max(8, width() - sum(widths) - len(_GAP) * len(widths))
    fitted = fit(names, room)
    first = max(len(name) for name in (header[0], *fitted))
    lines = []
    for name, values in zip((header[0], *fitted), (header[1:], *cells), strict=True):
        right = [value.rjust(size) for value, size in zip(values, widths, strict=True)]
        lines.append(_GAP.join([name.ljust(first), *right]).rstrip())
    return "\n".join(lines)


def fit(names: Sequence[str], room: int) -> list[str]:
    """Names within so many columns: what all begin with is left out first, then the middle of each."""
    if all(len(name) <= room for name in names):
        return list(names)
    first, last = min(names), max(names)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)
    cut = max(first.rfind(sign, 0, same) + 1 for sign in "/_-. =")
    short = [f"…{name[cut:]}" if cut > 1 else name for name in names]
    return [name if len(name) <= room else _without_middle(name, room) for name in short]


def _harmless(line: str) -> str:
    return "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c)[0] == "C" else c for c in line)


def _without_middle(name: str, room: int) -> str:
    head = (room - 1) // 2
    return f"{name[:head]}…{name[len(name) - (room - 1 - head) :]}"


def print_json(value: object, *, one_line: bool = False) -> None:
    """Prints strict JSON in ASCII: what is not finite is null, paths and the like are text."""
    print(json.dumps(plain(value), indent=None if one_line else 1, allow_nan=False), flush=one_line)


def plain(value: Any) -> Any:
    """A value as JSON has it."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    return os.fspath(value) if isinstance(value, Path) else str(value)
