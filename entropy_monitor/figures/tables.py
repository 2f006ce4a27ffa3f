"""All heads at one step: of a run, or of a table that `measure` returned."""

from __future__ import annotations

import pandas as pd

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.figures import style
from entropy_monitor.frames import RunTables


def heads_of(run: RunTables | pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The heads table of a run, and the run's name for titles; a table itself has none."""
    if isinstance(run, pd.DataFrame):
        return run, ""
    return run.heads, style.short([run.name])[0]


def at_step(table: pd.DataFrame, step: int | None) -> tuple[int, pd.DataFrame]:
    """The rows of the last step up to `step`, or of the last at all; and that step. An empty table stays so.

    Raises:
        ConfigurationError: the table begins after `step`.
    """
    if table.empty:
        return 0, table
    steps = table["step"]
    before = steps if step is None else steps[steps <= step]
    if before.empty:
        raise ConfigurationError(f"step is {step}; what is to be shown was first read at step {steps.min()}")
    at = int(before.max())
    return at, table[steps == at]
