"""`load_run`: a run after the fact, or while it goes on: DataFrames and figures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entropy_monitor.frames import layer_names, scalar
from entropy_monitor.plots import Plots
from entropy_monitor.store import RunData, RunReader, Session, alerts_frame, table_frame

if TYPE_CHECKING:
    import pandas as pd


def load_run(run_dir: str | os.PathLike[str]) -> Run:
    """Open the run in a directory; it may still be going on.

    Raises:
        RunDirectoryError: there is no run at `run_dir`.
    """
    return Run(run_dir)


class Run(Plots):
    """A run: its tables as DataFrames, read when first asked for and kept until `refresh`.

    Sessions and ranks are merged as `store.read_run` says. Entropies in nats; NaN where a value is
    not known.

    Args:
        run_dir: the run's directory.

    Raises:
        RunDirectoryError: there is no run at `run_dir`.
    """

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        self._reader = RunReader(run_dir)

    @property
    def path(self) -> Path:
        """The run's directory."""
        return self._reader.path

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.path.resolve().name

    @cached_property
    def _data(self) -> RunData:
        return self._reader.read()

    @cached_property
    def heads(self) -> pd.DataFrame:
        """A row per step, layer, call and head (columns: `records.HEADS`), in the order of execution."""
        return table_frame(self._data.heads)

    @cached_property
    def layers(self) -> pd.DataFrame:
        """A row per step and layer (columns: `records.LAYERS`), in the order of execution."""
        return table_frame(self._data.layers)

    @cached_property
    def scalars(self) -> pd.DataFrame:
        """A row per step and name: the loss, and what the user gave."""
        return table_frame(self._data.scalars)

    @cached_property
    def alerts(self) -> pd.DataFrame:
        """A row per alert in its last state, in the order in which they opened (see `store.alerts_frame`)."""
        return alerts_frame(self._data.alerts)

    @cached_property
    def loss(self) -> pd.Series[float]:
        """The scalar `loss` by step, a value each; empty when none was given."""
        return scalar(self)

    @property
    def layer_names(self) -> list[str]:
        """The layers' names in the order of execution."""
        return layer_names(self.heads)

    @property
    def info(self) -> dict[str, Any]:
        """What ran: format, created, model, options and versions of the first session."""
        return dict(self._data.info)

    @property
    def plan(self) -> dict[str, Any]:
        """What was measured, per layer, and how."""
        return dict(self._data.plan)

    @property
    def sessions(self) -> list[Session]:
        """The process starts of the run, with their steps, options and versions."""
        return list(self._data.sessions)

    @property
    def problems(self) -> list[str]:
        """What could not be read, and why; empty when all is well."""
        return list(self._data.problems)

    def refresh(self) -> Run:
        """Read what was added since; returns the run itself."""
        data = self._reader.read()
        for name in ("heads", "layers", "scalars", "alerts", "loss"):
            self.__dict__.pop(name, None)
        self.__dict__["_data"] = data
        return self

    def __repr__(self) -> str:
        data = self._data
        steps = _steps(data.sessions)
        model = data.info.get("model", {}).get("class", "unknown model")
        open_alerts = int(self.alerts["closed"].isna().sum())
        counts = [
            f"{len(self.layer_names)} layers",
            f"{data.heads.num_rows} head rows",
            f"{len(self.alerts)} alerts ({open_alerts} open)",
            f"{len(data.sessions)} session{'s' * (len(data.sessions) != 1)}",
        ]
        if data.problems:
            counts.append(f"{len(data.problems)} problem{'s' * (len(data.problems) != 1)}")
        return f"<Run {self.name!r}: {model}, {steps}, {', '.join(counts)}>"


def _steps(sessions: Sequence[Session]) -> str:
    first = [s.first_step for s in sessions if s.first_step is not None]
    last = [s.last_step for s in sessions if s.last_step is not None]
    return f"steps {min(first)} to {max(last)}" if first and last else "no steps yet"
