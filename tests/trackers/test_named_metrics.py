from __future__ import annotations

from pathlib import Path

import pytest

from entropy_monitor.records import HEADS, SCALARS, Record
from entropy_monitor.store import RunWriter
from entropy_monitor.trackers.aggregates import aggregate_layers
from entropy_monitor.trackers.named_metrics import NamedMetrics, last_scalars
from entropy_monitor.trackers.whole_model import WholeModel
from tests.dashboards.records_factory import columns, event, info, record


def test_the_whole_model_is_that_of_all_layers_however_few_are_shown() -> None:
    one = record(0, layers=40)
    everything = WholeModel().metrics(aggregate_layers(one))
    named = NamedMetrics(max_layers=2).take(one)
    assert named.values.items() <= everything.items()
    assert {name.split("/")[1] for name in named.values} == {"all", "layer_00", "layer_39"}
    of_all = {name for name in everything if name.startswith("attention/all/")}
    assert of_all <= named.values.keys()
    assert len(named.layers) == 40


def test_it_says_whether_norms_are_known_of_all() -> None:
    metrics = NamedMetrics()
    assert metrics.take(record(0)).in_full
    assert not metrics.take(record(10, sigma_qk=float("nan"))).in_full


def test_a_layer_with_an_alert_is_shown() -> None:
    metrics = NamedMetrics(max_layers=2)
    metrics.take(record(0, layers=9))
    assert metrics.alert(event(layer="blocks.3.attn"))
    assert "attention/layer_03/entropy_min" in metrics.take(record(10, layers=9)).values


def test_a_continued_run_takes_up_its_alerts(tmp_path: Path) -> None:
    store = RunWriter(tmp_path)
    store.open(info(str(tmp_path)))
    store.log(record(10))
    store.alert(event(step=10, layer="blocks.5.attn"))
    store.alert(event(step=30, alert_id="a2", opened=30, layer="blocks.6.attn"))
    store.close()
    metrics = NamedMetrics(info(str(tmp_path), session=1), max_layers=2)
    metrics.start(20)
    assert [alert.opened for alert in metrics.book.alerts] == [10]
    shown = metrics.take(record(20, layers=9)).shown
    assert [layer.index for layer in shown] == [0, 5, 8]


def test_of_scalars_the_last_counts() -> None:
    rows = [{"step": s, "name": "lr", "value": float(s)} for s in (8, 9, 10)]
    given = last_scalars(Record(10, HEADS.empty(), scalars=columns(SCALARS, rows)))
    assert given == {"attention/train/lr": pytest.approx(10.0)}
