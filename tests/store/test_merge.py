from __future__ import annotations

import numpy as np
import pyarrow as pa

from entropy_monitor.records import HEADS, SCALARS, Columns
from entropy_monitor.store.codec import arrow_schema, to_batch
from entropy_monitor.store.merge import Part, cutoffs, latest_alerts, merge_events, merge_table
from tests.store.samples import columns, event


def part(session: int, steps: list[int], rank: int = 0, shift: float = 0.0) -> Part:
    batches = [to_batch(HEADS, columns(HEADS, step, shift=shift)) for step in steps]
    return Part(session, rank, pa.Table.from_batches(batches, schema=arrow_schema(HEADS)))


def test_a_later_session_takes_over_from_its_first_step() -> None:
    parts = [part(0, [0, 10, 20, 30]), part(1, [20, 40], shift=0.5)]
    ends = cutoffs(parts)
    assert ends == {0: 20}
    # Step 30 was measured by the first session only, on a timeline that was left.
    expected = pa.concat_tables([part(0, [0, 10]).rows, part(1, [20, 40], shift=0.5).rows])
    assert merge_table(HEADS, parts, ends).equals(expected)


def test_sessions_that_went_further_back_overtake_all_before_them() -> None:
    parts = [part(0, [0, 10, 20]), part(1, [30, 40]), part(2, []), part(3, [10])]
    assert cutoffs(parts) == {0: 10, 1: 10, 2: 10}
    assert cutoffs([part(0, [0]), part(1, [])]) == {}
    assert cutoffs([]) == {}


def test_a_session_of_all_ranks_ends_where_any_rank_of_the_next_begins() -> None:
    parts = [part(0, [0, 10], rank=3), part(1, [20], rank=0), part(1, [10], rank=1)]
    assert cutoffs(parts) == {0: 10}


def test_of_a_key_written_twice_the_later_row_counts() -> None:
    twice = Part(0, 0, pa.concat_tables([part(0, [1, 2]).rows, part(0, [1], shift=0.5).rows]))
    expected = pa.concat_tables([part(0, [1], shift=0.5).rows, part(0, [2]).rows])
    assert merge_table(HEADS, [twice], {}).equals(expected)


def test_rows_are_in_the_order_of_execution() -> None:
    names = tuple(f"block.{n}" for n in (11, 2, 0))
    batches = [to_batch(HEADS, columns(HEADS, step, layers=names)) for step in (20, 3)]
    shuffled = pa.Table.from_batches(batches).take(pa.array([7, 2, 9, 4, 11, 0, 5, 10, 1, 8, 3, 6]))
    found = merge_table(HEADS, [Part(0, 0, shuffled)], {})
    assert found.equals(pa.Table.from_batches(batches[::-1]))


def test_scalars_stay_in_the_order_of_writing() -> None:
    given: Columns = {
        "step": np.array([5, 5, 4]),
        "name": ["z", "a", "z"],
        "value": np.array([1.0, 2.0, 3.0]),
    }
    rows = pa.Table.from_batches([to_batch(SCALARS, given)])
    found = merge_table(SCALARS, [Part(0, 0, rows)], {})
    assert found.to_pydict() == {"step": [4, 5, 5], "name": ["z", "z", "a"], "value": [3.0, 1.0, 2.0]}


def test_nothing_is_an_empty_table() -> None:
    assert merge_table(HEADS, [], {}).equals(arrow_schema(HEADS).empty_table())


def test_events_of_a_left_timeline_are_left_out() -> None:
    logs = {
        (0, 0): (event(10), event(30, "closed", opened=10)),
        (1, 0): (event(20, id_="b"),),
    }
    assert [(e.step, e.event) for e in merge_events(logs, {0: 20})] == [(10, "opened"), (20, "opened")]
    assert [alert.closed for alert in latest_alerts(merge_events(logs, {0: 20}))] == [None, None]


def test_ids_counted_anew_are_other_alerts() -> None:
    events = [event(10), event(15, "updated", opened=10), event(40)]
    assert [(a.opened, a.updated) for a in latest_alerts(events)] == [(10, 15), (40, 40)]


def test_ranks_that_see_the_same_are_heard_once() -> None:
    same = event(12, id_="x")
    logs = {
        (0, 0): (event(10), event(30, "closed", opened=10)),
        (0, 1): (
            same,
            event(13, id_="other heads", heads=(5,)),
            event(14, id_="other layer", layer="a"),
            event(14, id_="other kind", kind="loss_spike"),
            event(50, id_="later"),
        ),
        (1, 1): (event(60, id_="x"),),
    }
    found = [alert.id for alert in latest_alerts(merge_events(logs, {}))]
    assert found == ["a", "other heads-r1", "other layer-r1", "other kind-r1", "later-r1", "x-r1"]


def test_of_ranks_that_read_the_same_sequences_one_counts() -> None:
    lower, upper = part(0, [0, 10]).rows, part(0, [0], shift=0.5).rows
    parts = [Part(0, 1, upper, group=0), Part(0, 0, lower, group=0)]
    assert merge_table(HEADS, parts, {}).equals(lower)
    both = merge_table(HEADS, [*parts, Part(0, 2, upper)], {})
    rows = dict(zip(both["step"].to_pylist(), both["rows_read"].to_pylist(), strict=True))
    assert rows == {0: 64, 10: 32}


def test_heads_of_several_ranks_come_side_by_side() -> None:
    rows = part(0, [0]).rows
    place = rows.schema.get_field_index("head")
    moved = rows.set_column(place, rows.schema.field(place), pa.array(rows["head"].to_numpy() + 2))
    found = merge_table(HEADS, [Part(0, 0, rows, group=0), Part(0, 1, moved, group=0)], {})
    assert found["head"].to_pylist() == [0, 1, 2, 3] * 2
    assert found["rows_read"].to_pylist() == [32] * 8
