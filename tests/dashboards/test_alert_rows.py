from __future__ import annotations

import json

import numpy as np
import pytest

from entropy_monitor.dashboards.alert_rows import alert_rows
from entropy_monitor.dashboards.packing import pack
from entropy_monitor.store import Place
from tests.dashboards.records_factory import event

PLACES = [
    Place("a", 0, 0), Place("a", 0, 1), Place("a", 1, 0), Place("a", 1, 1), Place("b", 0, 0), Place("b", 0, 1)
]  # fmt: skip
RANKS = {"a": 0, "b": 1}


def row(**changes):
    (found,) = alert_rows([event(**{"layer": "a"} | changes).alert], PLACES, RANKS)
    return found


def test_an_alert_finds_its_heads_among_those_of_the_run():
    found = row(heads=(1,), evidence={"worst_head": 1, "call": 1, "entropy": 0.5}, alert_id="x")
    assert (found.key, found.layer_place, found.heads, found.rows, found.worst_row) == (
        "x@10",
        0,
        (1,),
        (1, 3),
        3,
    )
    assert found.evidence == [("worst head", "1"), ("attention call", "1"), ("entropy (nats)", "0.5")]
    assert (found.map, found.map_text) == (None, "")


def test_an_alert_of_the_whole_run_or_of_a_layer_that_was_not_measured():
    assert (row(layer="", heads=()).layer_place, row(layer="", heads=()).rows) == (None, ())
    found = row(layer="gone", heads=(0,), evidence={"worst_head": 0})
    assert (found.layer_place, found.rows, found.worst_row) == (None, (), None)


def test_heads_that_are_not_there_have_no_row():
    found = row(heads=(1, 7), evidence={"worst_head": 7})
    assert (found.heads, found.rows, found.worst_row) == ((1, 7), (1, 3), None)


def test_a_worst_head_without_a_call_is_of_the_first():
    assert row(evidence={"worst_head": 1}).worst_row == 1
    assert row(evidence={}).worst_row is None


def test_order_and_keys():
    alerts = [event(alert_id="a", opened=o, layer="b").alert for o in (30, 10, 20)]
    rows = alert_rows(alerts, PLACES, RANKS)
    assert [r.key for r in rows] == ["a@30", "a@10", "a@20"]
    assert alert_rows([], PLACES, RANKS) == []


def test_the_map_and_what_it_is_of():
    found = row(evidence={"worst_head": 1, "call": 1, "map": [[0.5, float("nan")], [1, 0]]})
    assert found.map.dtype == np.float32
    np.testing.assert_array_equal(found.map, [[0.5, np.nan], [1, 0]])
    assert found.map_text == "Attention map of head 1 of a, call 1"
    assert row(evidence={"map": [[1]]}).map_text == "Attention map of the worst head of a"


@pytest.mark.parametrize(
    "bad",
    [
        None,
        3,
        "text",
        [],
        [[]],
        [1, 2],
        [[1], [1, 2]],
        [["x"]],
        [[None]],
        {"a": 1},
        [[[1]]],
        [[10**400]],
        [{}],
    ],
    ids=repr,
)
def test_a_map_that_is_none_costs_the_map_only(bad):
    found = row(evidence={"map": bad, "entropy": 1.0})
    assert (found.map is None or np.isnan(found.map).all(), found.evidence) == (
        True,
        [("entropy (nats)", "1")],
    )


@pytest.mark.parametrize(
    "evidence",
    [
        {"worst_head": [1], "call": {"a": 1}},
        {"worst_head": "<script>", "call": "x"},
        {"worst_head": None, "call": None},
        {"worst_head": float("nan"), "call": float("inf")},
    ],
)
def test_evidence_of_another_kind_is_shown_as_far_as_it_can_be(evidence):
    found = row(evidence=evidence | {"map": [[1.0]]})
    assert found.worst_row is None
    pack(found.to_dict())


def test_as_a_dict_it_lacks_the_map_and_can_be_packed():
    found = row(evidence={"worst_head": 0, "map": [[1.0]]}, closed=None)
    shown = found.to_dict()
    assert (shown["map"], shown["has_map"], row().to_dict()["has_map"]) == (None, True, False)
    json.dumps(shown, allow_nan=False)
    expected = {
        "key", "id", "kind", "severity", "layer", "layer_place", "heads", "rows", "worst_row", "opened",
        "updated", "closed", "title", "message", "advice", "evidence", "has_map",
    }  # fmt: skip
    assert expected <= shown.keys()
