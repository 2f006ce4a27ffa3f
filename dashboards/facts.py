"""What ran and how it was measured, a line each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def fact_rows(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Of `run.json`: name and text of each entry that says something."""
    return [(key, text) for key, value in info.items() if (text := _flat(value))]


def plan_rows(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Of the measuring plan: each layer, and how it is measured."""
    return [(str(layer), _flat(how)) for layer, how in plan.items()]


def _flat(value: Any) -> str:
    """Options, versions or a plan's entry on one line; parameter shapes, which are long, as their number."""
    if isinstance(value, Mapping):
        return ", ".join(
            f"{key}: {len(inner) if key == 'parameters' and isinstance(inner, Mapping) else _flat(inner)}"
            for key, inner in value.items()
        )
    if isinstance(value, (list, tuple)):
        return " ".join(_flat(inner) for inner in value)
    return "–" if value is None else str(value)
