from __future__ import annotations

import math

import pytest

from entropy_monitor.dashboards import wandb_tables
from entropy_monitor.dashboards.wandb_tables import alert_rows, head_rows, layer_rows
from entropy_monitor.records import HEADS
from entropy_monitor.trackers.aggregates import aggregate_layers
from tests.dashboards.records_factory import bare, event, head_row, record


def test_heads_are_rows_with_null_as_none_and_nan_kept() -> None:
    names, rows = head_rows(bare(7, [head_row(7, 0, 0), head_row(7, 0, 1, entropy=math.nan)]).heads)
    assert tuple(names) == HEADS.names
    first, second = (dict(zip(names, row, strict=True)) for row in rows)
    assert first["step"] == 7
    assert first["layer"] == "blocks.0.attn"
    assert first["floor_weights"] is None
    assert first["sigma_qk"] == 3.0
    assert math.isnan(second["entropy"])


def test_of_too_many_heads_the_sharpest_and_broken_ones_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_tables, "MOST_ROWS", 3)
    entropies = [2.0, 0.5, math.nan, 1.0, 0.25]
    rows = [head_row(0, 0, head, entropy=entropy) for head, entropy in enumerate(entropies)]
    names, kept = head_rows(bare(0, rows).heads)
    assert [row[names.index("head")] for row in kept] == [1, 2, 4]


def test_layers_are_rows_with_their_metrics_and_names() -> None:
    names, rows = layer_rows(aggregate_layers(record(7)))
    first, second = (dict(zip(names, row, strict=True)) for row in rows)
    assert (first["layer_index"], first["layer"], first["call"], first["heads"]) == (0, "blocks.0.attn", 0, 4)
    assert second["sigma_q"] == 6.0
    assert first["entropy_mean"] == pytest.approx(1.8195)
    assert first["floor_weights"] is None
    assert len(rows[0]) == len(names) == len(set(names))


def test_alerts_are_rows() -> None:
    names, rows = alert_rows([event().alert, event("closed", 30, "a2").alert])
    assert [dict(zip(names, row, strict=True))["closed"] for row in rows] == [None, 30]
    assert dict(zip(names, rows[0], strict=True))["heads"] == "0, 2"
