from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from entropy_monitor.records import HEADS, TABLES, Table
from entropy_monitor.store import alerts_frame, table_frame
from entropy_monitor.store.codec import arrow_schema
from tests.store.samples import event


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_columns_keep_their_types_also_when_empty(table: Table) -> None:
    frame = table_frame(arrow_schema(table).empty_table())
    assert list(frame.columns) == list(table.names)
    for column in table.columns:
        if column.dtype != "str":
            assert frame[column.name].dtype == np.dtype(column.dtype)
    assert HEADS.names[0] == "step"


def test_alerts_are_in_their_last_state() -> None:
    events = [
        event(5, id_="b", heads=()),
        event(1, id_="a"),
        event(9, "closed", id_="a", opened=1, severity="severe", heads=(0, 1, 2)),
    ]
    frame = alerts_frame(events)
    assert list(frame.columns) == [
        "id", "kind", "severity", "layer", "heads", "opened", "updated", "closed",
        "title", "message", "advice", "evidence",
    ]  # fmt: skip
    assert frame["id"].tolist() == ["a", "b"]
    assert frame["severity"].tolist() == ["severe", "warning"]
    assert frame["heads"].tolist() == [[0, 1, 2], []]
    assert frame["updated"].tolist() == [9, 5]
    assert frame["closed"].dtype == pd.Int64Dtype()
    assert frame["closed"].isna().tolist() == [False, True]
    assert frame["evidence"][0]["share"] == 0.125


def test_no_alerts_are_a_frame_of_the_same_types() -> None:
    empty, full = alerts_frame([]), alerts_frame([event(1)])
    assert empty.dtypes.to_dict() == full.dtypes.to_dict()
    assert len(empty) == 0
