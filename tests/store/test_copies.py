from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from entropy_monitor.records import HEADS, LAYERS
from entropy_monitor.store import read_run
from entropy_monitor.store.codec import arrow_schema, to_batch
from entropy_monitor.store.copies import strangers
from entropy_monitor.store.merge import Part
from entropy_monitor.store.writer import RunWriter
from tests.store.samples import NAMES, columns, event, info, record


def part(rank: int, factor: float = 1.0, layer: str = "", steps: tuple[int, ...] = (10, 20)) -> Part:
    """What a rank wrote; the weights of one layer, or of all, are `factor` times those of others."""
    batches = []
    for step in steps:
        made = columns(HEADS, step, shift=rank)
        mine = np.array([not layer or name == layer for name in made["layer"]])
        for name in ("sigma_q", "sigma_k", "sigma_qk"):
            made[name] = np.where(mine, factor, 1.0) * np.asarray(made[name])
        batches.append(to_batch(HEADS, made))
    return Part(0, rank, pa.Table.from_batches(batches, schema=arrow_schema(HEADS)))


def test_copies_of_weights_may_differ_by_rounding() -> None:
    ranks = [part(0), part(1), part(2, 1 + 1e-5), part(3, float("nan"))]
    assert strangers({"heads": ranks}) == {}


def test_other_weights_under_the_same_names_are_told_by_layer() -> None:
    ranks = [part(0), part(1, 1.01, NAMES[1]), part(2), part(3, 1.01, NAMES[1])]
    assert strangers({"heads": ranks}) == {(0, NAMES[1]): (1, 3)}
    assert strangers({"heads": ranks[1:]}) == {(0, NAMES[1]): (2,)}


@pytest.mark.parametrize("factor", [1.0, 1 + 9e-4, 1 + 2e-3, 0.0, -1.0, float("nan"), float("inf")])
def test_what_is_told_at_once_is_what_is_found_head_by_head(
    monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    shuffled = part(4)
    shuffled = replace(shuffled, rows=shuffled.rows.take(pa.array([3, 2, 1, 0, 4, 5, 6, 7])))
    for ranks in ([part(0), part(1, factor)], [part(0, factor), part(1), part(2)], [part(0), shuffled]):
        at_once = strangers({"heads": ranks})
        with monkeypatch.context() as patch:
            patch.setattr("entropy_monitor.store.copies._are_copies", lambda *_: False)
            assert strangers({"heads": ranks}) == at_once


def test_heads_that_lie_side_by_side_and_other_sessions_are_not_compared() -> None:
    mine, theirs = part(0), part(1, 2.0)
    place = theirs.rows.schema.get_field_index("head")
    heads = pa.array(theirs.rows["head"].to_numpy() + 2)
    moved = replace(theirs, rows=theirs.rows.set_column(place, "head", heads))
    assert strangers({"heads": [mine, moved]}) == {}
    assert strangers({"heads": [mine, replace(theirs, session=1)]}) == {}
    assert strangers({"heads": [mine, part(1, 2.0, steps=(30,))]}) == {}


def test_their_rows_and_alerts_are_left_out_and_this_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        given = record(10, shift=float(rank))
        if rank:
            for table in (given.heads, given.layers):
                table["sigma_q"] = 2 * np.asarray(table["sigma_q"])  # type: ignore[index]
        writer = RunWriter(tmp_path, rank=rank)
        writer.open(replace(info(), rank=rank))
        writer.log(given)
        writer.alert(event(10, id_=f"r{rank}"))
        writer.close()
    data = read_run(tmp_path)
    alone = pa.Table.from_batches([to_batch(HEADS, columns(HEADS, 10))])
    assert data.heads.equals(alone)
    assert data.layers.equals(pa.Table.from_batches([to_batch(LAYERS, columns(LAYERS, 10))]))
    assert [item.alert.id for item in data.alerts] == ["r0"]
    (problem,) = data.problems
    assert "ranks 1 hold other weights" in problem
    assert all(name in problem for name in NAMES)
