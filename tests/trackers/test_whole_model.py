from __future__ import annotations

import math

import pytest

from entropy_monitor.records import HEADS, Record
from entropy_monitor.schedule import IN_FULL
from entropy_monitor.trackers.aggregates import aggregate_layers
from entropy_monitor.trackers.whole_model import SURE_AFTER, WholeModel
from tests.dashboards.records_factory import bare, head_row, seldom


def largest(model: WholeModel, *sigmas: float | None, call: int = 0) -> float | None:
    """The largest σ_QK after a record of a head per layer; NaN: not known, None: the layer did not run."""
    rows = [head_row(0, i, 0, call=call, sigma_qk=s) for i, s in enumerate(sigmas) if s is not None]
    return model.reduce(aggregate_layers(bare(0, rows))).get("sigma_qk_max")


def test_weighs_heads_alike() -> None:
    rows = [head_row(0, 0, h, entropy=1.0) for h in range(3)] + [head_row(0, 1, 0, entropy=2.0)]
    overall = WholeModel().reduce(aggregate_layers(bare(0, rows)))
    assert overall["entropy_mean"] == pytest.approx(1.25)
    assert overall["entropy_min"] == 1.0
    assert overall["max_logit"] == 3.0
    assert overall["sigma_qk_max"] == 5.0


def test_a_reading_that_is_not_finite_shows() -> None:
    rows = [head_row(0, 0, 0), head_row(0, 0, 1, entropy=math.nan, max_logit=math.inf)]
    overall = WholeModel().reduce(aggregate_layers(bare(0, rows)))
    assert math.isnan(overall["entropy_min"])
    assert overall["max_logit"] == math.inf


def test_the_largest_norm_is_that_of_all_layers_or_not_there() -> None:
    model = WholeModel()
    found = [model.reduce(aggregate_layers(record)) for record in seldom(9)]
    assert [each.get("sigma_qk_max") for each in found] == [9.0, *[None] * 3, 9.0, *[None] * 3, 9.0]
    assert all(each.keys() >= {"entropy_mean", "entropy_min", "max_logit"} for each in found)


def test_a_layer_that_is_never_known_is_not_waited_for() -> None:
    model = WholeModel()
    found = [largest(model, 3.0, math.nan) for _ in range(SURE_AFTER + 2)]
    assert found == [None] * (SURE_AFTER - 1) + [3.0] * 3


def test_a_layer_that_is_not_known_any_more_is_not_waited_for_for_ever() -> None:
    model = WholeModel()
    assert largest(model, 3.0, 9.0) == 9.0
    found = [largest(model, 3.0, math.nan) for _ in range(3 * SURE_AFTER + 1)]
    assert found == [None] * (3 * SURE_AFTER - 1) + [3.0] * 2


@pytest.mark.parametrize("first", range(IN_FULL))
def test_a_process_may_begin_between_the_records_in_full(first: int) -> None:
    model = WholeModel()
    found = [largest(model, 3.0, math.nan if s % IN_FULL else 9.0) for s in range(first, first + 12)]
    assert set(found) == {9.0, None}
    assert found.count(9.0) == 3


def test_a_layer_that_does_not_run_in_a_step_is_not_waited_for() -> None:
    model = WholeModel()
    assert [largest(model, 3.0, 9.0), largest(model, 3.0, None), largest(model, math.nan, 9.0)] == [
        9,
        3,
        None,
    ]


def test_calls_of_a_layer_are_told_apart() -> None:
    model = WholeModel()
    assert largest(model, 3.0) == 3.0
    assert [largest(model, math.nan, call=1) for _ in range(SURE_AFTER)] == [None] * SURE_AFTER
    assert largest(model, 4.0) == 4.0


def test_records_of_scalars_alone_do_not_count() -> None:
    model = WholeModel()
    for _ in range(SURE_AFTER):
        assert model.metrics(aggregate_layers(Record(0, HEADS.empty()))) == {}
    assert largest(model, 3.0, math.nan) is None


def test_a_record_in_full_is_among_the_first() -> None:
    assert SURE_AFTER >= IN_FULL
