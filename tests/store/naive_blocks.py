"""The oracle of blocks: records are gathered and summed up one head at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from entropy_monitor.records import ABOVE_FLOOR, HEADS, LEVELLED, SHARE, Record
from entropy_monitor.store import Place

Reading: TypeAlias = dict[str, float]
Shown: TypeAlias = dict[int, dict[Place, dict[str, tuple[float, float, float]]]]
"""By step and place, each figure's mean, least and largest value, and `broken` three times."""


def readings(record: Record) -> dict[Place, Reading]:
    """A record's figures by place."""
    heads: Any = record.heads
    found = {}
    for row, place in enumerate(places(record)):
        one = {n: float(np.float32(heads[n][row])) for n in HEADS.names if HEADS[n].dtype == "float32"}
        one[SHARE] = one["entropy"] / one["max_entropy"] if one["max_entropy"] > 0 else np.nan
        one[ABOVE_FLOOR] = one["entropy"] - one["floor_row"]
        found[place] = one
    return found


def places(record: Record) -> list[Place]:
    """What a record's rows are of."""
    heads: Any = record.heads
    return [Place(*p) for p in zip(heads["layer"], heads["call"], heads["head"], strict=True)]


def blocks_of(records: Sequence[Record], size: int) -> list[list[Record]]:
    """Records in blocks of so many of the same heads, of ascending steps; what fills none is left out."""
    found: list[list[Record]] = []
    block: list[Record] = []
    for record in records:
        if block and (places(record) != places(block[-1]) or record.step <= block[-1].step):
            block = []
        block.append(record)
        if len(block) == size:
            found.append(block)
            block = []
    return found


def shown(records: Sequence[Record], blocks: Sequence[Sequence[Record]]) -> Shown:
    """What is to be seen of one session of one rank: its blocks, and the records that are in none."""
    within = {id(record) for block in blocks for record in block}
    made: Shown = {}
    for group in [*blocks, *([r] for r in records if id(r) not in within)]:
        of_step = made.setdefault(group[0].step, {})
        each = [readings(record) for record in group]
        for place in each[0]:
            is_block = len(group) > 1
            of_step[place] = {n: _ends([e[place][n] for e in each], is_block=is_block) for n in LEVELLED}
            broken = sum(not np.isfinite(one[place]["entropy"]) for one in each)
            of_step[place]["broken"] = (float(broken),) * 3
    return made


def _ends(values: Sequence[float], *, is_block: bool) -> tuple[float, float, float]:
    if not is_block:
        return (values[0],) * 3
    finite = [value for value in values if np.isfinite(value)]
    return (sum(finite) / len(finite), min(finite), max(finite)) if finite else (np.nan,) * 3
