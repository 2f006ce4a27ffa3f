from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_monitor.records import HEADS, LAYERS, SCALARS, TABLES, Columns, Table
from entropy_monitor.store.codec import to_batch
from entropy_monitor.store.ranks import merge_ranks
from tests.store.samples import columns

NAN = float("nan")


def heads(entropy: float, rows_read: int, **changes: float) -> pa.Table:
    made = columns(HEADS, 1, layers=("a",), heads=1)
    made.update(
        entropy=np.array([entropy], np.float32),
        rows_read=np.array([rows_read]),
        **{name: np.array([value], np.float32) for name, value in changes.items()},
    )
    return pa.Table.from_batches([to_batch(HEADS, made)])


def merged(*ranks: pa.Table) -> dict[str, object]:
    (row,) = merge_ranks(HEADS, ranks).to_pylist()
    return dict(row)


def test_one_rank_is_left_alone() -> None:
    only = heads(NAN, 3)
    assert merge_ranks(HEADS, [only]) is only


def test_different_heads_are_put_side_by_side_untouched() -> None:
    first = to_batch(HEADS, columns(HEADS, 1, layers=("a",)))
    second = to_batch(HEADS, columns(HEADS, 1, layers=("b",), shift=0.1))
    found = merge_ranks(HEADS, [pa.Table.from_batches([first]), pa.Table.from_batches([second])])
    assert found.equals(pa.Table.from_batches([first, second]))


VALUE = st.floats(0, 8, width=32)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(VALUE, VALUE, st.integers(0, 500)), min_size=2, max_size=5))
def test_means_are_weighted_by_rows_read(readings: list[tuple[float, float, int]]) -> None:
    row = merged(*(heads(e, w, entropy_se=s, floor_row=e, max_logit=s) for e, s, w in readings))
    total = sum(w for _, _, w in readings)
    assert row["rows_read"] == total
    assert row["max_logit"] == max(s for _, s, _ in readings)
    if total:
        mean = math.fsum(e * w for e, _, w in readings) / total
        error = math.sqrt(math.fsum((s * w) ** 2 for _, s, w in readings)) / total
        assert row["entropy"] == pytest.approx(mean, rel=1e-6)
        assert row["floor_row"] == pytest.approx(mean, rel=1e-6)
        assert row["entropy_se"] == pytest.approx(error, rel=1e-6)
    else:
        assert math.isnan(row["entropy"])  # type: ignore[arg-type]
        assert row["floor_row"] is None


def test_nan_is_a_reading_and_null_is_none() -> None:
    row = merged(
        heads(NAN, 1, floor_row=NAN, entropy_se=NAN, sigma_q=NAN, sigma_k=NAN, max_logit=NAN),
        heads(2.0, 3, floor_row=1.0, entropy_se=0.5, sigma_q=4.0, sigma_k=NAN, max_logit=9.0),
    )
    assert math.isnan(row["entropy"])  # type: ignore[arg-type]
    assert row["max_logit"] == 9.0
    assert (row["floor_row"], row["sigma_q"], row["sigma_k"]) == (None, 4.0, None)
    assert row["entropy_se"] is None


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_figure_says_how_it_merges_and_nothing_else_does(table: Table) -> None:
    place = {*table.key, "layer_index", "attention"}
    assert {column.name for column in table.columns if column.merge is None} == place & set(table.names)


def test_a_rank_that_read_nothing_does_not_count() -> None:
    assert merged(heads(NAN, 0), heads(2.0, 3))["entropy"] == 2.0


def test_layers_take_the_maximum_and_scalars_the_mean() -> None:
    layers = [
        pa.Table.from_batches([to_batch(LAYERS, columns(LAYERS, 1, shift=shift))]) for shift in (0.5, 0.25)
    ]
    assert merge_ranks(LAYERS, layers).equals(layers[0])

    def scalar(value: float) -> pa.Table:
        given: Columns = {"step": np.array([1]), "name": ["loss"], "value": np.array([value])}
        return pa.Table.from_batches([to_batch(SCALARS, given)])

    assert merge_ranks(SCALARS, [scalar(1.0), scalar(2.0)])["value"].to_pylist() == [1.5]
    assert math.isnan(merge_ranks(SCALARS, [scalar(1.0), scalar(NAN)])["value"][0].as_py())
