"""What was read, as pandas DataFrames."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import pyarrow as pa

from entropy_monitor.records import AlertEvent
from entropy_monitor.store.merge import latest_alerts


def table_frame(table: pa.Table) -> pd.DataFrame:
    """A table with the types of its columns: int64, float32 or float64 (null as NaN), text."""
    frame: pd.DataFrame = table.to_pandas()
    return frame


def alerts_frame(events: Sequence[AlertEvent]) -> pd.DataFrame:
    """One row for each alert in its last state, in the order in which they opened.

    Columns: id, kind, severity, layer, heads (list of int), opened, updated, closed (nullable, NA
    while open), title, message, advice, evidence (dict).
    """
    alerts = latest_alerts(events)
    text = ("id", "kind", "severity", "layer")
    columns: dict[str, object] = {
        name: pd.Series([getattr(alert, name) for alert in alerts], dtype="str") for name in text
    }
    columns["heads"] = pd.Series([list(alert.heads) for alert in alerts], dtype="object")
    for name in ("opened", "updated"):
        columns[name] = pd.Series([getattr(alert, name) for alert in alerts], dtype="int64")
    columns["closed"] = pd.Series([alert.closed for alert in alerts], dtype="Int64")
    for name in ("title", "message", "advice"):
        columns[name] = pd.Series([getattr(alert, name) for alert in alerts], dtype="str")
    columns["evidence"] = pd.Series([dict(alert.evidence) for alert in alerts], dtype="object")
    return pd.DataFrame(columns)
