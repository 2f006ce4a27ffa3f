"""What of a run's files counts: whose records, up to which step, and where blocks stand in their place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from entropy_monitor.store.column_file import ColumnFile
from entropy_monitor.store.held_records import HeldRecords, Ints


@dataclass(frozen=True)
class Source:
    """What one rank of one session wrote of a table.

    Attributes:
        session: from 0.
        rank: of the process.
        group: the lowest of the ranks that worked on the same sequences.
        file: its rows.
        blocks: its blocks (`records.LEVELS`), where it keeps any.
        end: the first step that is not its own any more; None where it owns all.
        left_out: layers whose rows are not to be merged with those of lower ranks.
    """

    session: int
    rank: int
    group: int
    file: ColumnFile
    blocks: ColumnFile | None = None
    end: int | None = None
    left_out: frozenset[str] = frozenset()

    @property
    def own(self) -> HeldRecords:
        """The records of the steps that are its own."""
        held = self.file.held
        return held if self.end is None else held[held.steps < self.end]


@dataclass(frozen=True)
class Part:
    """Records of one file of a source that count; of `source.blocks` they are blocks."""

    source: Source
    file: ColumnFile
    held: HeldRecords

    @property
    def is_blocks(self) -> bool:
        """Whether each stands for several measured steps."""
        return self.file is self.source.blocks

    @property
    def identity(self) -> Any:
        """Equal for parts that differ in nothing but how many records they have."""
        source = self.source
        return id(self.file), self.file.batches.generation, source.end, source.left_out, source.group


def parts_of(sources: Sequence[Source], *, in_blocks: bool) -> Iterator[Part]:
    """The records that count: those before a session's end, or blocks of them and what is in none."""
    for source in sources:
        own = source.own
        if in_blocks and source.blocks is not None:
            held = source.blocks.held
            untils = source.blocks.first_values("until")
            held = source.blocks.held  # without those that could not be read
            whole = np.ones(len(held), dtype=bool) if source.end is None else untils < source.end
            yield Part(source, source.blocks, held[whole])
            own = own[~_within(own.steps, held.steps[whole], untils[whole])]
        yield Part(source, source.file, own)


def first_change(old: Sequence[Part], new: Sequence[Part]) -> int | None:
    """The first step of which `new` has something that `old` has not, or the reverse; None if there is none.

    Args:
        old: some parts.
        new: parts of the same identities.
    """
    changed: list[int] = []
    for before, after in zip(old, new, strict=True):
        same = before.held.common_start(after.held)
        changed += [int(part.held.steps[same:].min()) for part in (before, after) if len(part.held) > same]
    return min(changed, default=None)


def _within(steps: Ints, begins: Ints, ends: Ints) -> npt.NDArray[np.bool_]:
    """Which steps lie in one of the intervals from a begin to its end, both included."""
    if not len(begins):
        return np.zeros(len(steps), dtype=bool)
    order = np.argsort(begins, kind="stable")
    # Of intervals that overlap, as after steps that went back, the end that reaches farthest counts.
    reach = np.maximum.accumulate(ends[order])
    place = np.searchsorted(begins[order], steps, side="right") - 1
    within: npt.NDArray[np.bool_] = (place >= 0) & (steps <= reach[np.maximum(place, 0)])
    return within
