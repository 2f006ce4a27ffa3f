"""`HeldRecords`: which records a file of a table holds, and where their rows stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Ints: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True)
class HeldRecords:
    """Records in the order of writing, as columns `[N]` of int64; a record's rows stand together.

    Attributes:
        steps: of each record.
        batches: the batch that it is in.
        firsts: its first row there.
        rows: how many it has.
        orders: which places in the model these are of; a place in `ColumnFile.orders`.
    """

    steps: Ints
    batches: Ints
    firsts: Ints
    rows: Ints
    orders: Ints

    @staticmethod
    def none() -> HeldRecords:
        """No records."""
        return HeldRecords(*(np.empty(0, np.int64) for _ in fields(HeldRecords)))

    @staticmethod
    def joined(several: Sequence[HeldRecords]) -> HeldRecords:
        """These after one another."""
        return HeldRecords(
            *(np.concatenate(of) for of in zip(*(part.columns for part in several), strict=True))
        )

    @property
    def columns(self) -> tuple[Ints, ...]:
        """All columns, as they are listed above."""
        return self.steps, self.batches, self.firsts, self.rows, self.orders

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, which: Any) -> HeldRecords:
        """Those of a slice, of places or of a mask."""
        return HeldRecords(*(column[which] for column in self.columns))

    def common_start(self, other: HeldRecords) -> int:
        """How many records at the beginning are the same in both."""
        most = min(len(self), len(other))
        same = np.ones(most, dtype=bool)
        for one, two in zip(self.columns, other.columns, strict=True):
            same &= one[:most] == two[:most]
        return most if same.all() else int(same.argmin())
