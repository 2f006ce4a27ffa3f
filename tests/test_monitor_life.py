"""A monitor's life: closing, leaving, copying, forking, resuming."""

from __future__ import annotations

import copy
import gc
import io
import json
import math
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from entropy_monitor import ConfigurationError, EntropyMonitor, load_run
from entropy_monitor.plan import Plan
from entropy_monitor.records import Alert
from entropy_monitor.schedule import Schedule
from tests.training import ListSink, batches, flat, tiny, train


def start(
    run_dir: Path, model: Any = None, **options: Any
) -> tuple[Any, torch.optim.Optimizer, EntropyMonitor]:
    model = tiny() if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    return model, optimizer, EntropyMonitor(model, optimizer=optimizer, run_dir=run_dir, **options)


def test_closing_leaves_everything_as_it_was(tmp_path: Path) -> None:
    threads, model = threading.active_count(), tiny()
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    keys = list(model.state_dict())
    model, optimizer, monitor = start(tmp_path, model, every=1, loggers=[ListSink()])
    train(model, optimizer, 2, monitor.step)
    monitor.close()
    monitor.close()
    assert threading.active_count() == threads
    assert not torch_module._global_forward_hooks
    assert not torch_module._global_forward_pre_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    assert list(model.state_dict()) == keys
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_steps_after_close_do_nothing(tmp_path: Path) -> None:
    sink = ListSink()
    model, optimizer, monitor = start(tmp_path, every=1, loggers=[sink])
    train(model, optimizer, 2, monitor.step)
    monitor.close()
    reports: list[Any] = []
    train(model, optimizer, 2, lambda loss: reports.append(monitor.step(loss, step=7)))
    assert [(r.step, r.measured, r.events) for r in reports] == [(7, False, ())] * 2
    assert len(sink.records) == 2
    assert not torch_module._global_forward_hooks
    assert monitor.faults == {}


def test_a_with_block_closes_and_lets_errors_through(tmp_path: Path) -> None:
    sink = ListSink()
    model, optimizer, monitor = start(tmp_path, every=1, loggers=[sink])
    train(model, optimizer, 1, monitor.step)

    def loop() -> None:
        with monitor as entered:
            assert entered is monitor
            raise KeyError("the user's own")

    with pytest.raises(KeyError, match="the user's own"):
        loop()
    assert sink.calls[-1] == "close"
    assert not torch_module._global_forward_hooks


@pytest.mark.parametrize("steps", [0, 1, 2], ids=["armed", "armed again", "off"])
def test_the_model_can_be_copied_and_saved_at_any_time(steps: int, tmp_path: Path) -> None:
    model, optimizer, monitor = start(tmp_path, every=2 if steps == 2 else 1)
    train(model, optimizer, min(steps, 1), monitor.step)
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(flat(twin), flat(model))
    assert torch.equal(flat(loaded), flat(model))
    train(twin, torch.optim.SGD(twin.parameters(), 0.1), 1)  # a copy is nobody's
    train(model, optimizer, 2, monitor.step)
    monitor.close()
    rows = load_run(tmp_path).heads
    assert set(rows["rows_read"]) == {4 * 6}


def test_nothing_is_kept_alive_after_close(tmp_path: Path) -> None:
    model, optimizer, monitor = start(tmp_path, every=1, loggers=[ListSink()], on_alert=lambda a: None)
    train(model, optimizer, 2, monitor.step)
    monitor.close()
    alive = [weakref.ref(x) for x in (model, optimizer, monitor, model.blocks[0].q.weight)]
    del model, optimizer, monitor
    gc.collect()
    assert [ref() for ref in alive] == [None] * 4


def test_a_forgotten_monitor_delivers_and_leaves(tmp_path: Path) -> None:
    sink = ListSink()
    model, optimizer, monitor = start(tmp_path, every=1, loggers=[sink])
    losses = train(model, optimizer, 3, monitor.step)
    alive = weakref.ref(monitor)
    del monitor
    gc.collect()
    assert alive() is None
    assert not torch_module._global_forward_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert [v for _, _, v in sink.scalars()] == losses
    assert sink.calls[-1] == "close"


def test_a_monitor_that_is_open_at_exit_delivers(tmp_path: Path) -> None:
    script = f"""
import torch
from entropy_monitor import EntropyMonitor
from tests.training import tiny, train
model = tiny()
optimizer = torch.optim.SGD(model.parameters(), 0.1)
monitor = EntropyMonitor(model, optimizer=optimizer, run_dir={str(tmp_path)!r}, every=4)
train(model, optimizer, 7, monitor.step)
"""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    run = load_run(tmp_path)
    assert list(run.scalars["step"]) == list(range(7))
    assert sorted(run.heads["step"].unique()) == [0, 4]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_writes_nothing(tmp_path: Path) -> None:
    sink = ListSink()
    model, optimizer, monitor = start(tmp_path, every=1, loggers=[sink])
    train(model, optimizer, 2, monitor.step)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            report = monitor.step(1.0)
            monitor.close()
            code = int(report.measured)
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    train(model, optimizer, 2, monitor.step)
    monitor.close()
    assert [r.step for r in sink.records] == [0, 1, 2, 3]
    assert sorted(load_run(tmp_path).heads["step"].unique()) == [0, 1, 2, 3]


def push(model: Any, step: int) -> None:
    """A slow collapse."""
    if step >= 12:
        with torch.no_grad():
            for part in (model.blocks[0].q, model.blocks[0].k):
                part.weight.mul_(1.3)


def watched(
    run_dir: Path, stops: list[int], every: int
) -> tuple[pd.DataFrame, pd.DataFrame, list[tuple[int, str, str]], list[str]]:
    """A training that is stopped and resumed at some steps; what it left."""
    told: list[str] = []
    events: list[tuple[int, str, str]] = []
    data = batches()
    state: dict[str, Any] | None = None
    weights: Any = None
    begin = 0
    for end in [*stops, 30]:
        model = tiny()
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        monitor = EntropyMonitor(
            model,
            optimizer=optimizer,
            run_dir=run_dir,
            every=every,
            rows=3,
            on_alert=lambda a: told.append(f"{a.id} {a.severity}"),
        )
        if state is not None:
            model.load_state_dict(weights[0])
            optimizer.load_state_dict(weights[1])
            monitor.load_state_dict(state)
        for step in range(begin, end):

            def after(
                loss: torch.Tensor, step: int = step, model: Any = model, monitor: Any = monitor
            ) -> None:
                report = monitor.step(loss)
                assert report.step == step
                events.extend((e.step, e.event, e.alert.id) for e in report.events)
                push(model, step)

            train(model, optimizer, 1, after, data)
        state = json.loads(json.dumps(monitor.state_dict(), allow_nan=False))
        weights = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        monitor.close()
        assert monitor.faults == {}
        begin = end
    run = load_run(run_dir)
    return run.heads, run.scalars, events, told


@pytest.mark.parametrize("stops", [[10], [13], [4, 5, 17, 22]], ids=str)
@pytest.mark.parametrize("every", [1, 4])
def test_a_resumed_run_equals_an_unbroken_one(stops: list[int], every: int, tmp_path: Path) -> None:
    heads, scalars, events, told = watched(tmp_path / "whole", [], every)
    again = watched(tmp_path / "parts", stops, every)
    pd.testing.assert_frame_equal(again[0], heads)
    pd.testing.assert_frame_equal(again[1], scalars)
    assert again[2:] == (events, told)
    assert events
    assert list(heads["step"].unique()) == list(range(0, 30, every))


def test_state_survives_a_fault_of_the_analyzer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, monitor = start(tmp_path / "a", every=1)
    train(model, optimizer, 2, monitor.step)

    def broken(self: object) -> None:
        raise RuntimeError("broken by hand")

    with monkeypatch.context() as patch:
        patch.setattr("entropy_monitor.analyzer.Analyzer.state_dict", broken)
        state = json.loads(json.dumps(monitor.state_dict()))
    monitor.close()
    assert state["analyzer"] is None
    assert monitor.faults == {"saving the analyzer": 1}
    _, _, resumed = start(tmp_path / "b")
    resumed.load_state_dict(state)
    assert resumed.state_dict()["schedule"]["next"] == 2
    resumed.close()


def test_events_found_while_saving_are_in_the_next_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator, where figures arrive after their step."""
    model, optimizer, monitor = start(tmp_path, every=1)
    train(model, optimizer, 1, monitor.step)
    with monkeypatch.context() as patch:
        patch.setattr("entropy_monitor.transfer.Parcel.arrived", False)
        train(model, optimizer, 1, lambda _: monitor.step(math.nan))
    monitor.state_dict()
    reports: list[Any] = []
    train(model, optimizer, 1, lambda loss: reports.append(monitor.step(loss)))
    monitor.close()
    opened: list[Alert] = [a for r in reports for a in r.alerts]
    assert [a.opened for a in opened] == [1]
    assert np.isfinite(load_run(tmp_path).heads["entropy"]).all()


class _Shrinking(nn.Module):
    """Self-attention whose number of heads is what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.heads = nn.Linear(8, 24), 2

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_a_layer_that_cannot_be_measured_leaves_the_others_alone(tmp_path: Path) -> None:
    model = nn.Sequential(_Shrinking(), _Shrinking(), _Shrinking())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with EntropyMonitor(model, optimizer=optimizer, run_dir=tmp_path, every=1) as monitor:
        for step in range(8):
            for heads in (2, 4, 4) if step else (2, 2, 2):  # micro-batches that disagree
                model[1].heads = heads
                loss = model(torch.randn(2, 5, 8)).sum()
                loss.backward()
            optimizer.step()
            monitor.step(loss)
        assert set(monitor.faults) == {"reading 1"}
    heads = load_run(tmp_path).heads
    assert sorted(heads.loc[heads["layer"] == "0", "step"].unique()) == list(range(8))
    assert sorted(heads.loc[heads["layer"] == "2", "step"].unique()) == list(range(8))
    # Of the layer at fault, no figure of half a step.
    assert list(heads.loc[heads["layer"] == "1", "step"].unique()) == [0]


class _Stop(BaseException):
    pass


def test_an_alert_that_ends_the_run_is_kept(tmp_path: Path) -> None:
    def stop(alert: Alert) -> None:
        raise _Stop

    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = EntropyMonitor(model, optimizer=optimizer, run_dir=tmp_path, every=1, on_alert=stop)
    with pytest.raises(_Stop), monitor:
        train(model, optimizer, 3, lambda loss: monitor.step(float("nan")))
    (alert,) = load_run(tmp_path).alerts.to_dict("records")
    assert alert["kind"] == "non_finite"


def test_a_loss_that_is_not_finite_is_told_with_its_own_step(tmp_path: Path) -> None:
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with EntropyMonitor(model, optimizer=optimizer, run_dir=tmp_path, every=5) as monitor:
        losses = iter([1.0, 1.0, 1.0, float("nan"), 1.0, 1.0, 1.0])
        train(model, optimizer, 7, lambda _: monitor.step(next(losses)))
    (alert,) = load_run(tmp_path).alerts.to_dict("records")
    assert alert["opened"] == 3
    assert "since step 3" in alert["message"]


@pytest.mark.parametrize(
    "state", [{"version": 2}, {"version": 2, "schedule": {}, "plan": {}, "scalars": None}]
)
def test_a_state_that_is_incomplete_is_refused(state: dict[str, Any], tmp_path: Path) -> None:
    model = tiny()
    with (
        EntropyMonitor(model, run_dir=tmp_path) as monitor,
        pytest.raises(ConfigurationError, match="incomplete: it has no analyzer"),
    ):
        monitor.load_state_dict(state)


_DAMAGES = [("rows", 0), ("rows", "many"), ("every", -1), ("signs", [1]), ("cost", {})]


@pytest.mark.parametrize(
    ("part", "value"),
    [("schedule", {}), ("schedule", {**Schedule(1).state_dict(), "next": "x"}), ("plan", None)]
    + [("plan", {**Plan("auto", "auto").state_dict(), name: value}) for name, value in _DAMAGES],
)
def test_a_state_that_is_damaged_is_refused_as_a_whole(part: str, value: Any, tmp_path: Path) -> None:
    with EntropyMonitor(tiny(), run_dir=tmp_path) as monitor:
        before = monitor.state_dict()
        with pytest.raises(ConfigurationError, match=f"damaged: its {part} cannot be read"):
            monitor.load_state_dict({**before, part: value})
        assert monitor.state_dict() == before


def test_starting_over_in_a_run_directory_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def start(first: int | None) -> None:
        model = tiny()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with EntropyMonitor(model, optimizer=optimizer, run_dir=tmp_path, every=1) as monitor:
            steps = iter(range(first or 0, 100))
            train(model, optimizer, 2, lambda loss: monitor.step(loss, step=next(steps) if first else None))

    start(None)
    start(2)
    assert caplog.text == ""
    start(None)
    assert "counts from 0 again" in caplog.text


def test_a_monitor_that_sees_nothing_any_more_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with EntropyMonitor(model, optimizer=optimizer, run_dir=tmp_path, every=1) as monitor:
        train(model, optimizer, 2, monitor.step)
        model.eval()
        train(model, optimizer, 30, monitor.step)
    assert caplog.text.count("nothing could be measured in 20 steps") == 1
    assert "in eval mode" in caplog.text
