"""From records to what trackers get, and which run directory a callback chooses."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from entropy_monitor import EntropyMonitor
from entropy_monitor.callbacks.metrics import LAYER_METRICS, MetricFeed, MetricSink, tracker_metrics
from entropy_monitor.callbacks.settings import free_dir, fresh_dir, readable
from entropy_monitor.step_report import StepReport
from entropy_monitor.trackers.aggregates import aggregate_layers
from entropy_monitor.trackers.layer_choice import MAX_LAYERS
from entropy_monitor.trackers.named_metrics import NamedMetrics
from entropy_monitor.trackers.whole_model import WholeModel
from tests.dashboards.records_factory import event, info, record, seldom
from tests.training import record as empty_record
from tests.training import tiny, train

ROOT = Path(__file__).parents[2]


def test_they_are_some_of_the_dashboards_metrics_under_the_same_names() -> None:
    one = record(3)
    shown = WholeModel().metrics(aggregate_layers(one))
    given = tracker_metrics(one, NamedMetrics())
    assert given.items() <= shown.items()
    left_out = shown.keys() - given.keys()
    assert not [n for n in left_out if n.startswith("attention/all/") or n.endswith(LAYER_METRICS)]
    heads = one.heads
    first = np.asarray(heads["layer_index"]) == 0
    least = np.asarray(heads["entropy"], dtype=np.float64)[first & (np.asarray(heads["call"]) == 0)].min()
    assert given["attention/layer_00/entropy_min"] == pytest.approx(least)


def test_the_largest_norm_is_given_where_it_is_that_of_the_whole_model() -> None:
    sink = MetricSink()
    for _ in range(2):  # another run begins anew
        sink.open(info())
        for one in seldom():
            sink.log(one)
        found = {step: given.get("attention/all/sigma_qk_max") for step, given in sink.take()}
        assert found == {0: 9.0, 1: None, 2: None, 3: None, 4: 9.0, 5: None}


def test_of_many_layers_not_all_are_given_but_those_with_an_alert() -> None:
    sink = MetricSink()
    sink.open(info())
    sink.log(record(0, layers=200))
    sink.alert(event(layer="blocks.77.attn"))
    sink.log(record(10, layers=200))
    layers = [{name.split("/")[1] for name in given if "/layer_" in name} for _, given in sink.take()]
    assert len(layers[0]) == MAX_LAYERS
    assert layers[1] - layers[0] == {"layer_77"}


class Watched:
    """As much of a monitor as a feed asks for; its records come when `deliver` says so."""

    def __init__(self, sink: MetricSink) -> None:
        self.open_alerts: tuple[Any, ...] = ()
        self.sink = sink
        self.waiting: list[int] = []

    def deliver(self) -> None:
        steps, self.waiting = self.waiting, []
        thread = threading.Thread(target=lambda: [self.sink.log(record(s)) for s in steps])
        thread.start()
        thread.join()

    def state_dict(self) -> dict[str, Any]:
        self.deliver()
        return {}


def test_a_record_that_comes_late_is_taken_later_under_its_own_step() -> None:
    sink = MetricSink()
    watched: Any = Watched(sink)
    feed = MetricFeed(nn.Linear(1, 1, device="meta"), sink)  # not on the CPU: nothing is waited for
    watched.waiting = [0]
    assert feed.after(StepReport(0, True), watched) == []
    watched.deliver()
    ((step, found),) = feed.after(StepReport(1, False), watched)
    assert step == found["attention/step"] == 0
    assert found["attention/open_alerts"] == 0
    watched.waiting = [2]
    assert feed.after(StepReport(2, True), watched) == []
    assert [step for step, _ in feed.rest(watched)] == [2]
    assert feed.rest(watched) == []


def test_on_the_cpu_a_step_has_its_own_metrics(tmp_path: Path) -> None:
    sink, model = MetricSink(), tiny()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    feed = MetricFeed(model, sink)
    steps: list[list[int]] = []
    with EntropyMonitor(model, optimizer=optimizer, run_dir=tmp_path, every=2, loggers=[sink]) as monitor:
        train(
            model, optimizer, 5, lambda x: steps.append([s for s, _ in feed.after(monitor.step(x), monitor)])
        )
    assert steps == [[0], [], [2], [], [4]]


def test_a_record_of_scalars_alone_has_no_metrics() -> None:
    sink = MetricSink()
    sink.log(empty_record(4))
    assert sink.take(until=4) == []


def test_a_place_that_is_taken_is_left_alone(tmp_path: Path) -> None:
    model, other = tiny(), nn.Linear(2, 2)
    assert free_dir(tmp_path / "a", model) == tmp_path / "a"
    EntropyMonitor(model, run_dir=tmp_path / "a").close()
    assert free_dir(tmp_path / "a", model) == tmp_path / "a"
    assert free_dir(tmp_path / "a", other) == tmp_path / "a-2"
    assert fresh_dir(tmp_path / "a") == tmp_path / "a-2"
    assert fresh_dir(tmp_path / "b") == tmp_path / "b"


def test_an_optimizer_that_cannot_be_read_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model, other = tiny(), nn.Linear(2, 2)
    mine = torch.optim.SGD(model.parameters(), 0.1)
    assert readable([mine, torch.optim.SGD(other.parameters(), 0.1), object()], model) == [mine]
    assert caplog.text.count("are not read") == 2


@pytest.mark.parametrize(
    ("framework", "packages"),
    [
        ("huggingface", ["transformers"]),
        ("lightning", ["lightning", "pytorch_lightning"]),
        ("accelerate", ["accelerate"]),
    ],
)
def test_a_missing_framework_is_named_with_its_extra(framework: str, packages: list[str]) -> None:
    script = f"""
import sys
import entropy_monitor.callbacks
from entropy_monitor import MissingExtraError
assert not {{"transformers", "lightning", "pytorch_lightning", "accelerate"}} & set(sys.modules)
sys.modules.update(dict.fromkeys({packages!r}))
try:
    import entropy_monitor.callbacks.{framework}
except MissingExtraError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert f"pip install 'entropy-monitor[{framework}]'" in done.stdout, done.stderr
