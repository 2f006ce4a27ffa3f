from __future__ import annotations

import math

import numpy as np

from entropy_monitor.dashboards.last_state import LastState
from entropy_monitor.records import HEADS, Record
from entropy_monitor.trackers.aggregates import aggregate_layers
from tests.dashboards.records_factory import bare, head_row, record


def take(state: LastState, given: Record) -> None:
    state.take(given.heads, aggregate_layers(given))


def test_norms_are_as_they_were_last_read_and_all_else_is_of_the_last_record() -> None:
    state = LastState()
    take(state, record(0, sigma_qk=5.0, entropy=2.0))
    take(state, record(10, sigma_qk=7.0, entropy=1.5))
    take(state, bare(20, [head_row(20, la, h, sigma_qk=math.nan) for la in range(2) for h in range(4)]))
    heads = state.heads
    assert set(heads["step"]) == {20}
    np.testing.assert_array_equal(heads["sigma_qk"], [7.0] * 8)
    np.testing.assert_allclose(heads["entropy"][:5], [2.02, 1.895, 1.77, 1.645, 1.77], rtol=1e-6)
    first, second = state.layers
    assert (first.index, second.index) == (0, 1)
    assert first.values["sigma_q"] == 5.0  # of the record before
    assert first.values["sigma_qk_max"] == 7.0


def test_a_reading_that_is_not_finite_is_not_filled_up() -> None:
    state = LastState()
    take(state, record(0))
    take(state, record(10, entropy=math.nan))
    assert np.isnan(state.heads["entropy"]).all()


def test_other_heads_are_not_mixed_up_with_those_before() -> None:
    state = LastState()
    take(state, bare(0, [head_row(0, 0, 0, sigma_qk=3.0), head_row(0, 0, 1, sigma_qk=4.0)]))
    take(state, bare(10, [head_row(10, 0, 1, sigma_qk=math.nan), head_row(10, 1, 0, sigma_qk=math.nan)]))
    assert np.isnan(state.heads["sigma_qk"]).all()
    assert [layer.index for layer in state.layers] == [0, 1]


def test_a_record_of_scalars_changes_nothing() -> None:
    state = LastState()
    take(state, record(0))
    take(state, Record(10, HEADS.empty()))
    assert set(state.heads["step"]) == {0}
    assert state.layers[0].heads == 4
