from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from entropy_monitor.records import HEADS, LAYERS, Record
from entropy_monitor.trackers.aggregates import (
    HEAD_METRICS,
    LAYER_METRICS,
    aggregate_layers,
    entropy_share,
    metric_words,
)
from entropy_monitor.trackers.whole_model import WholeModel
from tests.dashboards.records_factory import bare, columns, head_row, layer_row, record


def oracle(rec: Record) -> dict[str, float]:
    """The metrics of layers, head by head, in plain Python."""
    found: dict[str, list[float]] = {}
    for row in range(len(rec.heads["head"])):
        index, call = rec.heads["layer_index"][row], rec.heads["call"][row]
        tag = f"attention/layer_{index:02d}" + (f"/call_{call}" if call else "")
        for metric, (column, _) in HEAD_METRICS.items():
            value = float(rec.heads[column][row])
            if not (math.isnan(value) and HEADS[column].nullable):
                found.setdefault(f"{tag}/{metric}", []).append(value)
    reduce = {"mean": lambda v: math.fsum(v) / len(v), "min": min, "max": max}
    return {
        name: math.nan
        if any(math.isnan(v) for v in values)
        else reduce[HEAD_METRICS[name.rpartition("/")[2]][1]](values)
        for name, values in found.items()
    }


def random_record(seed: int) -> Record:
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for layer in range(5):
        for call in range(1 + layer % 2):
            for head in range(int(rng.integers(1, 6))):
                changes: dict[str, Any] = {"call": call, "entropy": rng.uniform(0, 3)}
                for name in ("floor_row", "floor_weights", "sigma_qk"):
                    changes[name] = rng.normal() if rng.random() < 0.6 else math.nan
                if rng.random() < 0.1:
                    changes["entropy"] = math.nan
                rows.append(head_row(7, layer, head, **changes))
    return bare(7, [rows[i] for i in rng.permutation(len(rows))])


@pytest.mark.parametrize("seed", range(8))
def test_reduces_heads_like_the_oracle_in_any_order_of_rows(seed: int) -> None:
    rec = random_record(seed)
    named = {k: v for k, v in WholeModel().metrics(aggregate_layers(rec)).items() if "/all/" not in k}
    assert named == pytest.approx(oracle(rec), rel=1e-12, nan_ok=True)


def test_names_each_reduction() -> None:
    (layer,) = aggregate_layers(record(0, layers=1))
    assert (layer.tag, layer.layer, layer.heads) == ("attention/layer_00", "blocks.0.attn", 4)
    assert layer.values["entropy_mean"] == pytest.approx(1.8125)
    assert layer.values["entropy_min"] == pytest.approx(1.625)
    assert layer.values["entropy_max"] == pytest.approx(2.0)
    assert layer.values["max_entropy"] == pytest.approx(math.log(16))
    assert layer.values["floor_row"] == pytest.approx(1.125)
    assert layer.values["sigma_qk_max"] == 6.0
    assert layer.values["max_logit"] == 4.0
    assert layer.values["sigma_q"] == 5.0


def test_what_is_not_known_is_left_out_and_never_zero() -> None:
    (layer,) = aggregate_layers(record(0, layers=1))
    absent = {"floor_activation", "floor_weights", "floor_paper", "sigma_v", "update_sigma", "grad_l2"}
    assert not absent & layer.values.keys()


def test_a_null_head_does_not_hide_the_others() -> None:
    rows = [head_row(0, 0, 0, floor_row=math.nan), head_row(0, 0, 1, floor_row=0.75)]
    (layer,) = aggregate_layers(bare(0, rows))
    assert layer.values["floor_row"] == 0.75


def test_a_reading_that_is_not_finite_shows_everywhere() -> None:
    rows = [head_row(0, 0, 0), head_row(0, 0, 1, entropy=math.nan, max_logit=math.inf)]
    layers = aggregate_layers(bare(0, rows))
    for name in ("entropy_mean", "entropy_min", "entropy_max"):
        assert math.isnan(layers[0].values[name])
    assert layers[0].values["max_logit"] == math.inf


def test_calls_of_one_layer_stand_apart() -> None:
    rows = [head_row(0, 0, 0), head_row(0, 0, 0, call=1, entropy=0.5)]
    first, second = aggregate_layers(bare(0, rows))
    assert (first.tag, second.tag) == ("attention/layer_00", "attention/layer_00/call_1")
    assert (first.values["entropy_min"], second.values["entropy_min"]) == (2.0, 0.5)


def test_layer_rows_without_heads_are_kept() -> None:
    rec = Record(0, HEADS.empty(), columns(LAYERS, [layer_row(0, 3)]))
    (layer,) = aggregate_layers(rec)
    assert layer.heads == 0
    assert layer.values == {"sigma_q": 8.0, "sigma_k": 9.0, "grad_linf": 0.5}
    assert WholeModel().reduce([layer]) == {}


def test_an_empty_record_has_nothing_to_show() -> None:
    rec = Record(0, HEADS.empty())
    assert WholeModel().metrics(aggregate_layers(rec)) == {}


def test_layer_metrics_are_the_norms_of_the_table() -> None:
    names = "sigma_q sigma_k sigma_v sigma_o grad_linf grad_l2 update_sigma update_entropy"
    assert tuple(names.split()) == LAYER_METRICS


def test_entropy_share_is_null_where_a_row_sees_one_key() -> None:
    rows = [head_row(0, 0, 0, entropy=1.0, max_entropy=2.0), head_row(0, 0, 1, entropy=0.0, max_entropy=0.0)]
    share = entropy_share(bare(0, rows).heads)
    assert share[0] == 0.5
    assert math.isnan(share[1])


def test_every_metric_is_said_in_words_with_its_unit() -> None:
    assert metric_words("entropy_min") == (
        "mean attention entropy of the rows read, nats, before dropout; least over heads"
    )
    assert metric_words("grad_linf") == "largest absolute gradient of the attention weights"
    assert all(metric_words(name) for name in (*HEAD_METRICS, *LAYER_METRICS))
