from __future__ import annotations

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_monitor.store.ordering import group_starts, sort_order

ROWS = st.lists(st.tuples(st.integers(-3, 3), st.sampled_from("abc")), max_size=30)


@settings(max_examples=100, deadline=None)
@given(ROWS)
def test_equal_rows_come_together_and_stay_in_order(given_rows: list[tuple[int, str]]) -> None:
    table = pa.table(
        {
            "number": pa.array([n for n, _ in given_rows], pa.int64()),
            "text": pa.array([t for _, t in given_rows], pa.string()),
        }
    )
    order = sort_order(table, ["number", "text"])
    appearance = {text: place for place, text in enumerate(dict.fromkeys(t for _, t in given_rows))}
    expected = sorted(range(len(given_rows)), key=lambda i: (given_rows[i][0], appearance[given_rows[i][1]]))
    assert order.tolist() == expected
    starts = group_starts(table, ["number", "text"], order).tolist()
    firsts = [
        i for i, place in enumerate(expected) if not i or given_rows[place] != given_rows[expected[i - 1]]
    ]
    assert starts == firsts
