"""Outcomes as Markdown tables, and the cells of tables that were written before."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

from tests.matrix.rules import Cell

Outcomes = Mapping[Cell, Mapping[str, Sequence[str]]]

HEADER = """# Compatibility

Written by `make docs` from the outcomes of the tests; not by hand. A cell is the tests that speak for it
(`tests/matrix/rules.py` says which): **yes** where all passed, *not run* where what they need is missing.
"""

_NONE = " "


def render(outcomes: Outcomes) -> str:
    """The page."""
    parts = [HEADER, _versions()]
    notes: list[str] = []
    for group in dict.fromkeys(cell.group for cell in outcomes):
        mine = {cell: found for cell, found in outcomes.items() if cell.group == group}
        parts.append(f"## {group}\n\n" + "\n".join(_table(mine, notes)) + "\n")
    if notes:
        parts.append("\n".join(f"{i}. {note}" for i, note in enumerate(notes, 1)) + "\n")
    return "\n".join(parts)


def cells_in(page: str) -> set[Cell]:
    """The cells that a page has an outcome for."""
    found: set[Cell] = set()
    group, columns = "", list[str]()
    for line in page.splitlines():
        if line.startswith("## "):
            group, columns = line[3:], []
        elif line.startswith("|") and not line.startswith("|-"):
            first, *entries = (entry.strip() for entry in line.strip("|").split("|"))
            if not columns:
                columns = entries
            else:
                found |= {
                    Cell(group, first, column)
                    for column, entry in zip(columns, entries, strict=True)
                    if entry
                }
    return found


def _table(outcomes: Outcomes, notes: list[str]) -> Iterator[str]:
    columns = list(dict.fromkeys(cell.column for cell in outcomes))
    group = next(iter(outcomes)).group
    yield "| | " + " | ".join(columns) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for row in dict.fromkeys(cell.row for cell in outcomes):
        entries = [_entry(outcomes.get(Cell(group, row, column)), notes) for column in columns]
        yield f"| {row} | " + " | ".join(entries) + " |"


def _entry(outcome: Mapping[str, Sequence[str]] | None, notes: list[str]) -> str:
    if outcome is None:
        return _NONE
    if "failed" in outcome:
        return "**no**" + _note(f"failed: {', '.join(sorted(set(outcome['failed']))[:5])}", notes)
    if "known failure" in outcome:
        return "no" + _note(f"known to fail: {', '.join(sorted(set(outcome['known failure']))[:5])}", notes)
    skipped = "; ".join(sorted(set(outcome.get("skipped", ()))))
    if "passed" not in outcome:
        return f"*not run*: {skipped}"
    return "yes" + (_note(f"in part not run: {skipped}", notes) if skipped else "")


def _note(text: str, notes: list[str]) -> str:
    if text not in notes:
        notes.append(text)
    return f" ({notes.index(text) + 1})"


def _versions() -> str:
    found = [f"Python {sys.version.split()[0]}"]
    for name in ("torch", "transformers", "lightning", "accelerate", "peft"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found) + ".\n"
