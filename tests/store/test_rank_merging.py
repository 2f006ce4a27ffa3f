from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from entropy_monitor.records import HEADS, LAYERS
from entropy_monitor.store.codec import to_batch
from entropy_monitor.store.rank_merging import RankMerge
from entropy_monitor.store.ranks import merge_ranks
from tests.store.random_runs import Shape, record


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("table", [HEADS, LAYERS], ids=lambda t: t.name)
def test_arrays_are_merged_as_rows_are(table, seed):
    """Three ranks, one of which lacks a head; nulls, readings that are not finite, rows without weight."""
    g = np.random.default_rng(seed)
    given = [getattr(record(g, 7, Shape(changing=0, broken=0.2)), table.name) for _ in range(3)]
    given[1] = {name: values[1:] for name, values in given[1].items()}
    if table is HEADS:
        given[0]["rows_read"][2] = given[1]["rows_read"][1] = given[2]["rows_read"][2] = 0
    rows = [pa.Table.from_batches([to_batch(table, each)]) for each in given]
    merged = merge_ranks(table, rows)

    figures = [column.name for column in table.columns if column.merge is not None]
    count = rows[0].num_rows
    merge = RankMerge({name: table[name].merge for name in figures})
    for rank, each in enumerate(rows):
        places = slice(1 if rank == 1 else 0, count)
        readings = {name: np.full((1, count), np.nan, np.float32) for name in figures}
        for name, values in readings.items():
            values[0, places] = each[name].to_numpy()
        there = np.zeros((1, count), dtype=bool)
        there[0, places] = True
        merge.add(readings, there, readings.get("rows_read"))
    for name in figures:
        found = np.full((1, count), -5, np.float32)
        merge.result_into(name, found)
        np.testing.assert_allclose(found[0], merged[name].to_numpy(), rtol=1e-6, err_msg=name)


def test_where_nobody_has_a_row_the_array_stays_as_it_is():
    merge = RankMerge({"x": "mean", "y": "same", "z": "sum"})
    for value in (1.0, 3.0):
        readings = {name: np.array([[value, np.nan]], np.float32) for name in "xyz"}
        merge.add(readings, np.array([[True, False]]), None)
    for name, expected in (("x", 2.0), ("y", 3.0), ("z", 4.0)):
        values = np.full((1, 2), -7, np.float32)
        merge.result_into(name, values)
        assert values.tolist() == [[expected, -7.0]]
