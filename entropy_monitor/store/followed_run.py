"""A run by columns: what pages read, again and again, while it grows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from entropy_monitor.records import AlertEvent
from entropy_monitor.store.reader import RunReader, Session

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Place:
    """What a row of a cube is of: a layer (in `call` 0 and `head` -1), or one head of one call."""

    layer: str
    call: int
    head: int


class Cubes:
    """A table as one array `[steps, places]` per column."""

    def __init__(self, rows: pa.Table) -> None:
        self._frame = rows.to_pandas()
        f = self._frame
        if "head" not in f:
            f = f.assign(call=0, head=-1)
        self._f = f
        self.steps = np.unique(f["step"].to_numpy())
        order = f.drop_duplicates(["layer", "call", "head"]).sort_values(
            ["layer_index", "layer", "call", "head"]
        )
        self.places = [
            Place(a, int(b), int(c)) for a, b, c in zip(order["layer"], order["call"], order["head"])
        ]
        self._keys = {p: i for i, p in enumerate(self.places)}
        self._s = np.searchsorted(self.steps, f["step"].to_numpy())
        self._p = np.array(
            [self._keys[Place(a, int(b), int(c))] for a, b, c in zip(f["layer"], f["call"], f["head"])],
            dtype=int,
        )

    def column(self, name: str, of: Literal["mean", "low", "high"] = "mean") -> Floats:
        out = np.full((len(self.steps), len(self.places)), np.nan, np.float32)
        if name == "entropy_share":
            m = self._f["max_entropy"].to_numpy()
            with np.errstate(all="ignore"):
                v = np.where(m > 0, self._f["entropy"].to_numpy() / m, np.nan)
        elif name == "above_floor":
            v = (self._f["entropy"] - self._f["floor_row"]).to_numpy()
        else:
            v = self._f[name].to_numpy()
        out[self._s, self._p] = v
        return out

    @property
    def measured(self) -> int:
        return len(self.steps)

    def is_known(self, name: str) -> bool:
        return bool(np.isfinite(self.column(name)).any()) if len(self._f) else False

    def present(self):
        out = np.zeros((len(self.steps), len(self.places)), bool)
        out[self._s, self._p] = True
        return out


class FollowedRun:
    """Reads a run again and again."""

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        self._reader = RunReader(run_dir)
        self._seen: Any = None
        self.refresh()

    @property
    def path(self) -> Path:
        return self._reader.path

    def refresh(self) -> bool:
        data = self._reader.read()
        seen = (
            data.heads.num_rows,
            data.layers.num_rows,
            data.scalars.num_rows,
            len(data.alerts),
            len(data.problems),
            str(data.plan),
            [s.closed for s in data.sessions],
        )
        if seen == self._seen:
            return False
        self._seen = seen
        self.heads, self.layers = Cubes(data.heads), Cubes(data.layers)
        f = data.scalars.to_pandas()
        self.scalars = {}
        for n, part in f.groupby("name", sort=False):
            s = part.drop_duplicates("step", keep="last").sort_values("step")
            self.scalars[str(n)] = (s["step"].to_numpy(np.int64), s["value"].to_numpy(np.float64))
        self.events: Sequence[AlertEvent] = data.alerts
        self.info, self.plan, self.problems = data.info, data.plan, data.problems
        self.sessions: Sequence[Session] = data.sessions
        self.written = max((p.stat().st_mtime for p in self.path.iterdir()), default=0.0)
        return True
