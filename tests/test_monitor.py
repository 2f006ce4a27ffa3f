from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from entropy_monitor import Alert, EntropyMonitor, Thresholds, load_run, measure
from tests.training import (
    ATTENTIONS,
    CLASSES,
    HEADS_N,
    TOKENS,
    WIDTH,
    ListSink,
    SeparateAttention,
    batches,
    tiny,
    train,
)

Start = Callable[..., tuple[Any, torch.optim.Optimizer, EntropyMonitor, ListSink]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Makes a model, its optimizer, a monitor and its sink."""

    def make(model: Any = None, **options: Any) -> Any:
        model = tiny() if model is None else model
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        sink = ListSink()
        given = {
            "optimizer": optimizer,
            "run_dir": tmp_path / "run",
            "rows": "all",
            "loggers": [sink],
            **options,
        }
        return model, optimizer, EntropyMonitor(model, **given), sink

    return make


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_row_is_the_forward_before_its_update(attention: Any, start: Start) -> None:
    model, optimizer, monitor, sink = start(tiny(attention), every=2)
    expected, data = {}, batches()
    for step in range(5):
        x, y = next(data)
        if step % 2 == 0:
            expected[step] = measure(model, x)
        train(model, optimizer, 1, lambda loss: monitor.step(loss), iter([(x, y)]))
    monitor.close()
    assert [r.step for r in sink.records] == [0, 2, 4]
    for record in sink.records:
        table = expected[record.step]
        for name in ("entropy", "max_entropy", "max_logit", "sigma_q", "sigma_qk", "rows_read"):
            np.testing.assert_allclose(record.heads[name], table[name], rtol=1e-5, err_msg=name)
        assert set(record.heads["step"]) == {record.step}
        assert set(record.layers["step"]) == {record.step}


def test_every_figure_is_there(start: Start) -> None:
    model, optimizer, monitor, sink = start(every=1)
    train(model, optimizer, 2, monitor.step)
    monitor.close()
    for record in sink.records:
        for table in (record.heads, record.layers):
            for name, column in table.items():
                if name not in ("layer", "attention"):
                    assert np.isfinite(np.asarray(column)).all(), name
        assert record.layers["layer"] == ["blocks.0", "blocks.1"]
    assert monitor.faults == {}


def test_without_an_optimizer_gradients_and_updates_are_null(start: Start) -> None:
    model, _, monitor, sink = start(optimizer=None)
    train(model, torch.optim.SGD(model.parameters(), 0.1), 1, monitor.step)
    monitor.close()
    for name in ("grad_linf", "grad_l2", "update_sigma", "update_entropy"):
        assert np.isnan(sink.column("layers", name)).all()
    assert np.isfinite(sink.column("layers", "sigma_q")).all()


def test_accumulation_counts_all_micro_batches(start: Start) -> None:
    model, optimizer, monitor, sink = start()
    data = batches()
    parts = [next(data) for _ in range(3)]
    table = measure(model, torch.cat([x for x, _ in parts]))
    for x, y in parts:
        F.cross_entropy(model(x), y).backward()
    optimizer.step()
    monitor.step()
    monitor.close()
    np.testing.assert_allclose(sink.column("heads", "entropy"), table["entropy"], rtol=1e-5)
    np.testing.assert_array_equal(sink.column("heads", "rows_read"), table["rows_read"])


def test_evaluation_between_steps_is_left_out(start: Start) -> None:
    model, optimizer, monitor, sink = start(every=1)

    def evaluate() -> None:
        x = torch.randn(4, TOKENS, WIDTH, generator=torch.Generator().manual_seed(5)) * 50
        model.eval()
        model(x)  # eval mode, with gradients
        model.train()
        with torch.no_grad():
            model(x)  # train mode, without

    data = batches()
    for _ in range(3):
        x, y = next(data)
        expected = measure(model, x)
        evaluate()
        loss = F.cross_entropy(model(x), y)
        evaluate()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        evaluate()
        monitor.step(loss)
        evaluate()
    monitor.close()
    np.testing.assert_allclose(sink.records[-1].heads["entropy"], expected["entropy"], rtol=1e-5)
    assert set(sink.column("heads", "rows_read")) == {4 * TOKENS}


def test_steps_between_add_nothing(start: Start) -> None:
    from torch.nn.modules import module

    model, optimizer, monitor, _ = start(every=4)
    reports = []

    def after(loss: torch.Tensor) -> None:
        reports.append(monitor.step(loss))
        hooked = bool(module._global_forward_hooks or module._global_forward_pre_hooks)
        assert hooked == (reports[-1].step % 4 == 3)
        assert monitor._weights.armed == hooked

    train(model, optimizer, 9, after)
    monitor.close()
    assert [r.step for r in reports if r.measured] == [0, 4, 8]
    assert [r.step for r in reports] == list(range(9))
    assert not module._global_forward_hooks


def test_the_users_step_numbers(start: Start) -> None:
    model, optimizer, monitor, sink = start(every=10)
    numbers = iter(range(100, 140, 2))
    train(model, optimizer, 20, lambda loss: monitor.step(loss, step=next(numbers)))
    monitor.close()
    assert [r.step for r in sink.records if len(r.heads["step"])] == [100, 110, 120, 130]
    assert [s for s, _, _ in sink.scalars()] == list(range(100, 140, 2))


def test_scalars_of_every_step_in_order(start: Start) -> None:
    model, optimizer, monitor, sink = start(every=4)
    losses = train(model, optimizer, 7, lambda loss: monitor.step(loss, scalars={"lr": 0.5}))
    monitor.close()
    expected = [row for s, v in enumerate(losses) for row in ((s, "loss", v), (s, "lr", 0.5))]
    assert sink.scalars() == expected
    scalars = load_run(monitor.run_dir).scalars
    kept = sorted(zip(scalars["step"], scalars["name"], scalars["value"], strict=True))
    assert kept == sorted(expected)


def test_scalars_do_not_pile_up(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("entropy_monitor.pipeline._SCALARS_HELD", 5)
    model, optimizer, monitor, sink = start(every=1000)
    losses = train(model, optimizer, 18, monitor.step)
    monitor.close()
    assert [len(r.scalars["step"]) for r in sink.records] == [1, 5, 5, 5, 2]
    assert [v for _, _, v in sink.scalars()] == losses


def test_the_run_is_kept(start: Start) -> None:
    model, optimizer, monitor, sink = start(every=3)
    train(model, optimizer, 7, monitor.step)
    monitor.close()
    run = load_run(monitor.run_dir)
    assert run.problems == []
    np.testing.assert_array_equal(np.sort(run.heads["entropy"]), np.sort(sink.column("heads", "entropy")))
    assert sorted(run.heads["step"].unique()) == [0, 3, 6]
    assert set(run.plan) == {"blocks.0", "blocks.1"}
    assert run.plan["blocks.0"]["heads"] == 2
    assert sink.info is not None
    options = dict(sink.info.options)
    assert options.pop("thresholds")["open_after"] == Thresholds().open_after
    assert options == {"every": 3, "rows": "all", "budget": 0.01, "owners": [], "optimizers": ["AdamW"]}
    assert (run.plan["blocks.0"]["rows"], run.plan["blocks.0"]["every"]) == ("all", 3)
    assert sink.info.session == 0


def test_a_run_is_continued(start: Start) -> None:
    for session, numbers in enumerate([range(4), range(4, 8)]):
        model, optimizer, monitor, sink = start(every=2)
        steps = iter(numbers)
        train(model, optimizer, 4, lambda loss: monitor.step(loss, step=next(steps)))  # noqa: B023
        monitor.close()
        assert sink.info is not None
        assert sink.info.session == session
    run = load_run(monitor.run_dir)
    assert sorted(run.heads["step"].unique()) == [0, 2, 4, 6]
    assert list(run.scalars["step"]) == list(range(8))


def test_example_inputs_change_nothing_of_the_run(start: Start) -> None:
    model, optimizer, monitor, sink = start(example_inputs=(torch.randn(1, TOKENS, WIDTH),))
    train(model, optimizer, 1, monitor.step)
    monitor.close()
    assert set(sink.column("heads", "rows_read")) == {4 * TOKENS}


FULL = ("sigma_qk", "sigma_q", "floor_activation", "floor_weights", "floor_paper")
ALWAYS = ("entropy", "entropy_se", "max_entropy", "max_logit", "floor_row", "rows_read")


def test_weights_are_read_in_one_measurement_of_four_after_the_first(start: Start) -> None:
    model, optimizer, monitor, sink = start(every=1)
    train(model, optimizer, 13, monitor.step)
    monitor.close()
    for record in sink.records:
        in_full = record.step <= 8 or record.step == 12
        for name in ALWAYS:
            assert np.isfinite(record.heads[name]).all(), name
        for columns, names in ((record.heads, FULL), (record.layers, ("sigma_q", "sigma_o", "update_sigma"))):
            for name in names:
                assert np.isfinite(columns[name]).all() == in_full, (record.step, name)
                assert np.isnan(columns[name]).all() != in_full, (record.step, name)
    assert monitor.faults == {}


def test_layers_with_an_alert_are_read_in_full(start: Start) -> None:
    model, optimizer, monitor, sink = start(every=1, rows="all")

    def after(loss: torch.Tensor) -> None:
        if monitor.step(loss).step >= 8:
            with torch.no_grad():
                for part in (model.blocks[0].q, model.blocks[0].k):
                    part.weight.mul_(1.6)

    train(model, optimizer, 30, after)
    monitor.close()
    opened = next(event for event in sink.events if event.event == "opened")
    assert opened.alert.layer == "blocks.0"
    assert {"sigma_qk", "sigma_qk_growth", "grad_linf"} <= set(opened.alert.evidence)
    record = next(r for r in sink.records if r.step > opened.step and r.step % 4)
    mine = np.array(record.heads["layer"]) == "blocks.0"
    assert np.isfinite(record.heads["sigma_qk"][mine]).all()
    assert np.isnan(record.heads["sigma_qk"][~mine]).all()


def test_rows_are_read_where_they_were_asked_for(start: Start) -> None:
    model, optimizer, monitor, sink = start(rows=2)
    train(model, optimizer, 1, monitor.step)
    monitor.close()
    assert set(sink.column("heads", "rows_read")) == {4 * 2}


def test_a_collapse_opens_an_alert(start: Start) -> None:
    told: list[str] = []
    model, optimizer, monitor, sink = start(every=1, on_alert=lambda a: told.append(a.id))
    opened: list[Alert] = []

    def after(loss: torch.Tensor) -> None:
        report = monitor.step(loss)
        opened.extend(report.alerts)
        if report.step >= 8:
            with torch.no_grad():
                for part in (model.blocks[0].q, model.blocks[0].k):
                    part.weight.mul_(1.6)

    train(model, optimizer, 30, after)
    assert monitor.open_alerts[0].layer == "blocks.0"
    monitor.close()
    assert opened
    assert told[0] == opened[0].id
    assert [e.alert.id for e in sink.events if e.event == "opened"] == [a.id for a in opened]
    pictured = np.array(sink.events[0].alert.evidence["map"])
    assert pictured.shape == (TOKENS, TOKENS)
    np.testing.assert_allclose(pictured.sum(1), 1.0, atol=1e-3)
    kept = load_run(monitor.run_dir).alerts
    assert set(kept["id"]) == {e.alert.id for e in sink.events}
    places = [i for i, item in enumerate(sink.items) if item is sink.events[0]]
    before = [r.step for r in sink.items[: places[0]] if hasattr(r, "heads")]
    assert before[-1] == sink.events[0].step  # the record comes first


def test_a_loss_that_is_not_finite_is_told_at_the_end(start: Start) -> None:
    model, optimizer, monitor, sink = start(every=100)
    train(model, optimizer, 3, monitor.step)
    monitor.step(math.nan)
    monitor.close()
    assert math.isnan(sink.scalars()[-1][2])
    assert any("loss" in e.alert.title.lower() for e in sink.events)


def test_other_modules_are_not_in_the_tables(start: Start) -> None:
    model, optimizer, monitor, sink = start()
    train(model, optimizer, 1, monitor.step)
    monitor.close()
    (record,) = sink.records
    assert set(record.heads["layer"]) == {"blocks.0", "blocks.1"}
    largest = max(float(p.grad.abs().max()) for n, p in model.named_parameters() if re.search("head|conv", n))
    assert max(np.asarray(record.layers["grad_linf"])) < largest
    assert model.head.weight.shape == (CLASSES, WIDTH)


def slow_when_measured(monitor: EntropyMonitor, cost: float) -> Callable[[torch.Tensor], None]:
    """A step that takes a second of a simulated clock, and `cost` more when it is measured."""
    now = [0.0]
    monitor._plan._cost._clock = lambda: now[0]

    def after(loss: torch.Tensor) -> None:
        now[0] += 1.0 + cost * monitor._watcher.armed
        monitor.step(loss)

    return after


def test_an_expensive_monitor_measures_less_often(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="entropy_monitor")
    model, optimizer, monitor, sink = start(every="auto")
    train(model, optimizer, 300, slow_when_measured(monitor, 0.35))
    state = json.loads(json.dumps(monitor.state_dict()))
    assert "1 step in 40 is measured." in str(monitor.describe())
    monitor.close()
    assert monitor.faults == {}
    steps = [r.step for r in sink.records if len(r.heads["step"])]
    assert [step // 10 for step in steps[:12]] == list(range(12))
    assert {step // 40 for step in steps if step > 200} == {5, 6, 7}
    told = [r for r in caplog.records if "on 1 step in 40 is measured: measuring takes 1.7%" in r.message]
    assert [r.levelname for r in told] == ["WARNING"]
    assert load_run(monitor.run_dir).plan["blocks.0"]["every"] == 40

    model, optimizer, monitor, sink = start(every="auto")
    monitor.load_state_dict(state)
    train(model, optimizer, 100, monitor.step)
    monitor.close()
    assert {r.step // 40 for r in sink.records if len(r.heads["step"])} == {8, 9}


def test_steps_that_bear_numbers_of_samples_are_not_all_measured(start: Start) -> None:
    model, optimizer, monitor, sink = start(every="auto")
    numbers = iter(range(0, 64 * 40, 64))
    train(model, optimizer, 40, lambda loss: monitor.step(loss, step=next(numbers)))
    monitor.close()
    assert [r.step // 640 for r in sink.records if len(r.heads["step"])] == [0, 1, 2, 3]


def test_the_kept_plan_tells_what_was_read(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("entropy_monitor.plan.ROWS", 2)
    monkeypatch.setattr("entropy_monitor.precision._NEGLIGIBLE", 1e-9)
    model, optimizer, monitor, _ = start(rows="auto", every=2, budget=None)
    train(model, optimizer, 150, monitor.step)
    monitor.close()
    for layer in load_run(monitor.run_dir).plan.values():
        assert layer["rows"] > 2
        assert layer["reading"].startswith(f"{layer['rows']} of" if layer["rows"] < TOKENS else "all")


def test_attention_that_is_written_out_in_mid_run_is_still_read(start: Start) -> None:
    class Either(SeparateAttention):
        by_hand = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not self.by_hand:
                return super().forward(x)
            q, k, v = (m(x).unflatten(-1, (HEADS_N, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
            maps = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
            return self.o((maps @ v).transpose(1, 2).flatten(2))

    model, optimizer, monitor, sink = start(tiny(Either), every=1)
    train(model, optimizer, 10, monitor.step)
    for block in model.blocks:
        block.by_hand = True
    train(model, optimizer, 8, monitor.step)
    monitor.close()
    assert monitor.faults == {}
    read = [r.step for r in sink.records if len(r.heads["step"])]
    assert read == [*range(10), *range(11, 18)]  # in one step it was not seen that all had changed


def test_what_was_given_is_kept(start: Start) -> None:
    model, optimizer, monitor, sink = start(every=5, rows=2)
    train(model, optimizer, 150, slow_when_measured(monitor, 9.0))
    monitor.close()
    assert [r.step for r in sink.records if len(r.heads["step"])] == list(range(0, 150, 5))
    assert set(sink.column("heads", "rows_read")) == {4 * 2}


def test_more_rows_are_read_where_their_error_is_large(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("entropy_monitor.plan.ROWS", 2)
    monkeypatch.setattr("entropy_monitor.precision._NEGLIGIBLE", 1e-9)
    model, optimizer, monitor, sink = start(rows="auto", every=2, budget=None)
    assert TOKENS > 4
    train(model, optimizer, 150, monitor.step)
    monitor.close()
    assert monitor.faults == {}
    read = [r.heads["rows_read"][0] // 4 for r in sink.records if len(r.heads["step"])]
    assert read[0] == 2
    assert read[-1] > 2
    assert sorted(read) == read


def test_ranks_keep_to_what_all_of_them_know(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("entropy_monitor.processes.is_distributed", lambda: True)
    monkeypatch.setattr("entropy_monitor.processes.rank", lambda: 0)
    monkeypatch.setattr("entropy_monitor.processes.launch", lambda run_dir: "")
    model, optimizer, monitor, sink = start(every="auto", rows="auto")
    train(model, optimizer, 150, slow_when_measured(monitor, 9.0))
    monitor.close()
    assert [r.step for r in sink.records if len(r.heads["step"])] == list(range(0, 150, 10))
