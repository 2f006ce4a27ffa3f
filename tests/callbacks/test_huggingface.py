"""The callback in real `Trainer` runs of tiny models."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

from entropy_monitor import ConfigurationError, EntropyMonitor, load_run
from entropy_monitor.callbacks import huggingface
from entropy_monitor.callbacks.huggingface import EntropyMonitorCallback
from entropy_monitor.errors import AttentionNotFoundError
from tests.training import ListSink

SIZE, LENGTH, VOCABULARY = 48, 12, 31


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Accelerate keeps its precision for the whole process, in its state and in the environment."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def dataset(seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, VOCABULARY, (SIZE, LENGTH), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def tiny(implementation: str = "sdpa", layers: int = 2) -> GPT2LMHeadModel:
    set_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=16,
        n_layer=layers,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    config._attn_implementation = implementation
    return GPT2LMHeadModel(config)


def trainer(folder: Path, callbacks: list[Any], model: Any = None, **options: Any) -> Trainer:
    plain: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 5,
    }
    args = TrainingArguments(output_dir=str(folder), **{**plain, **options})
    model = tiny() if model is None else model
    return Trainer(model, args, train_dataset=dataset(), eval_dataset=dataset(1)[:4], callbacks=callbacks)


def weights(model: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(one: list[Tensor], two: list[Tensor]) -> bool:
    return len(one) == len(two) and all(map(torch.equal, one, two))


def board(folder: Path) -> EventAccumulator:
    """The one event file that the Trainer's own tracker wrote."""
    (path,) = folder.rglob("*tfevents*")
    events = EventAccumulator(str(path))
    events.Reload()
    return events


def entries(of: Trainer) -> list[dict[str, Any]]:
    return [e for e in of.state.log_history if "attention/step" in e]


def without_times(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    clocks = ("runtime", "per_second", "memory", "flos")
    own = [e for e in history if "attention/step" not in e]
    return [{k: v for k, v in e.items() if not k.endswith(clocks)} for e in own]


MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3},
    "bf16": {"bf16": True},
    "checkpointing": {"gradient_checkpointing": True},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 2, "gradient_accumulation_steps": 2},
    "epochs": {"max_steps": -1, "num_train_epochs": 2, "logging_strategy": "epoch", "eval_strategy": "epoch"},
    "saving": {"save_strategy": "steps", "save_steps": 3},
}


@pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))
def test_on_equals_off(mode: dict[str, Any], tmp_path: Path) -> None:
    off = trainer(tmp_path / "off", [], **mode)
    off.train()
    random = torch.get_rng_state()
    callback = EntropyMonitorCallback(every=2)
    on = trainer(tmp_path / "on", [callback], **mode)
    on.train()
    assert torch.equal(random, torch.get_rng_state())
    assert equal(weights(off.model), weights(on.model))
    assert without_times(off.state.log_history) == without_times(on.state.log_history)
    assert callback.monitor is not None
    assert callback.monitor.faults == {}
    kept = load_run(tmp_path / "on" / "entropy_monitor")
    steps = range(0, on.state.global_step, 2)
    assert sorted(kept.heads["step"].unique()) == list(steps)
    assert kept.layers["grad_l2"][kept.layers["sigma_q"].notna()].notna().all()
    assert kept.layers["update_sigma"][kept.layers["sigma_q"].notna()].notna().all()


def test_the_comparison_sees_another_training(tmp_path: Path) -> None:
    off, on = trainer(tmp_path / "off", []), trainer(tmp_path / "on", [], learning_rate=1.001e-2)
    off.train()
    on.train()
    assert not equal(weights(off.model), weights(on.model))


def test_rows_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    """Row s is the forward before update s, of all micro-batches: replayed by hand from the same weights."""
    seen: list[list[Tensor]] = []

    class Keep(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append([])

    model = tiny("eager")
    with torch.no_grad():  # attention that is far from uniform, and changes from step to step
        for block in model.transformer.h:
            block.attn.c_attn.weight.mul_(30)
    handle = model.register_forward_pre_hook(
        lambda m, a, k: seen[-1].append(k["input_ids"].clone()), with_kwargs=True
    )
    states: list[dict[str, Tensor]] = []

    class States(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            states.append({k: v.clone() for k, v in kwargs["model"].state_dict().items()})

    options = {"gradient_accumulation_steps": 2, "max_steps": 4}
    callbacks = [Keep(), States(), EntropyMonitorCallback(every=3, rows="all")]
    for p in model.modules():
        if isinstance(p, torch.nn.Dropout):
            p.p = 0.0
    trainer(tmp_path, callbacks, model, **options).train()
    handle.remove()
    heads = load_run(tmp_path / "entropy_monitor").heads
    assert sorted(heads["step"].unique()) == [0, 3]
    for step in (0, 3):
        model.load_state_dict(states[step])
        model.eval()
        expected = []
        for inputs in seen[step]:
            with torch.no_grad():
                maps = model(input_ids=inputs, output_attentions=True).attentions
            p = torch.stack(maps).double()
            expected.append(-(p * p.clamp_min(1e-300).log()).sum(-1).mean(dim=(1, 3)))
        assert len(expected) == 2
        mean = torch.stack(expected).mean(0)
        got = heads[heads["step"] == step].sort_values(["layer_index", "head"])["entropy"]
        assert mean.max() < 1.6
        np.testing.assert_allclose(got.to_numpy(), mean.flatten().numpy(), atol=1e-5)


def test_metrics_reach_log_history_and_tensorboard(tmp_path: Path) -> None:
    sink = ListSink()
    # logging_steps is beyond the end: our metrics need no other log to travel with
    run = trainer(
        tmp_path,
        [EntropyMonitorCallback(every=2, loggers=[sink])],
        report_to=["tensorboard"],
        logging_steps=500,
    )
    run.train()
    found = entries(run)
    assert [e["attention/step"] for e in found] == [0, 2, 4]
    assert [e["step"] for e in found] == [1, 3, 5]
    assert [e["attention/open_alerts"] for e in found] == [0, 0, 0]
    heads = load_run(tmp_path / "entropy_monitor").heads
    for entry in found:
        rows = heads[heads["step"] == entry["attention/step"]]
        for layer in (0, 1):
            entropy = rows[rows["layer_index"] == layer]["entropy"].astype(float)
            assert entry[f"attention/layer_{layer:02d}/entropy_mean"] == pytest.approx(entropy.mean())
            assert entry[f"attention/layer_{layer:02d}/entropy_min"] == pytest.approx(entropy.min())
        assert entry["attention/all/entropy_min"] == pytest.approx(rows["entropy"].astype(float).min())
    assert "train_runtime" in run.state.log_history[-1]
    events = board(tmp_path)
    for name in ("attention/layer_01/entropy_mean", "attention/all/max_logit", "attention/step"):
        written = events.Scalars(f"train/{name}")
        assert [e.step for e in written] == [e["step"] for e in found]
        assert [e.value for e in written] == pytest.approx([e[name] for e in found])
    assert len(sink.records) >= 3


def test_metrics_reach_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    from tests.dashboards.test_wandb_logger import Recording

    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    (tmp_path / "home").mkdir()
    run = trainer(tmp_path / "out", [EntropyMonitorCallback(every=2)], report_to=["wandb"])
    run.train()
    wandb.run.finish()
    wandb.teardown()
    name = "attention/layer_00/entropy_min"
    rows = [r for r in Recording(tmp_path).rows if f"train/{name}" in r]
    assert [r["train/global_step"] for r in rows] == [1, 3, 5]
    assert [r[f"train/{name}"] for r in rows] == pytest.approx([e[name] for e in entries(run)])


def test_a_tracker_of_the_users_own_and_the_printers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps: list[int] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "attention/step" in logs:
                steps.append(state.global_step)
                assert kwargs["model"] is not None
                logs.clear()  # its own copy

    run = trainer(tmp_path, [Tracker(), EntropyMonitorCallback(every=3)])
    run.train()
    assert steps == [1, 4]
    assert len(entries(run)) == 2
    assert "attention" not in capsys.readouterr().out


def test_a_tracker_that_raises_is_left_out(tmp_path: Path) -> None:
    class Broken(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "attention/step" in logs:
                raise RuntimeError("no")

    run = trainer(tmp_path, [Broken(), EntropyMonitorCallback(every=1)])
    run.train()
    assert run.state.global_step == 6
    assert len(entries(run)) == 6


def test_a_subclass_finds_the_trackers_too(tmp_path: Path) -> None:
    class Mine(EntropyMonitorCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            super().on_train_begin(*args, **kwargs)

    trainer(tmp_path, [Mine(every=2)], report_to=["tensorboard"]).train()
    assert len(board(tmp_path).Scalars("train/attention/all/entropy_mean")) == 3


def test_long_trainings_are_thinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface, "_MOST_ENTRIES", 2)
    run = trainer(tmp_path, [EntropyMonitorCallback(every=1)])
    run.train()
    assert [e["attention/step"] for e in entries(run)] == [0, 3]
    assert load_run(tmp_path / "entropy_monitor").heads["step"].nunique() == 6


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_the_loss_is_what_the_trainer_logs(strategy: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"logging_strategy": strategy, "max_steps": -1, "num_train_epochs": 2}
    run = trainer(tmp_path, [EntropyMonitorCallback(every=5)], logging_first_step=True, **options)
    run.train()
    logged = [e for e in run.state.log_history if "loss" in e]
    scalars = load_run(tmp_path / "entropy_monitor").scalars
    loss = scalars[scalars["name"] == "loss"]
    assert list(loss["step"]) == [e["step"] - 1 for e in logged]
    assert list(loss["value"]) == pytest.approx([e["loss"] for e in logged])
    assert set(scalars["name"]) == {"loss", "grad_norm", "learning_rate"}


def test_evaluation_and_prediction_are_not_measured(tmp_path: Path) -> None:
    class Predict(TrainerCallback):
        trainer: Any = None

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.trainer.predict(dataset(2)[:3])

    helper = Predict()
    run = trainer(
        tmp_path, [helper, EntropyMonitorCallback(every=1, rows="all")], eval_strategy="steps", eval_steps=1
    )
    helper.trainer = run
    run.train()
    heads = load_run(tmp_path / "entropy_monitor").heads
    assert set(heads["rows_read"]) == {2 * LENGTH}  # one batch of two sequences a step, and nothing else


COLUMNS = ["step", "layer", "call", "head"]


def heads_of(folder: Path) -> pd.DataFrame:
    return load_run(folder).heads.sort_values(COLUMNS).reset_index(drop=True)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_resume_continues(elsewhere: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 10, "logging_steps": 5, "save_strategy": "steps", "save_steps": 5}
    whole = trainer(tmp_path / "whole", [EntropyMonitorCallback(every=2)], **options)
    whole.train()

    class Preempted(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 7:
                raise KeyboardInterrupt

    first = EntropyMonitorCallback(every=2)
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "cut", [first, Preempted()], **options).train()
    assert first.monitor is not None
    first.monitor.close()  # what leaving the process does
    source = tmp_path / "cut"
    run_dir = None
    if elsewhere:  # the checkpoint is not below output_dir
        source, run_dir = tmp_path / "other", tmp_path / "cut" / "entropy_monitor"
    second = EntropyMonitorCallback(run_dir, every=2)
    resumed = trainer(source, [second], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-5") if elsewhere else True)
    assert equal(weights(whole.model), weights(resumed.model))
    pd.testing.assert_frame_equal(
        heads_of(tmp_path / "whole" / "entropy_monitor"), heads_of(tmp_path / "cut" / "entropy_monitor")
    )
    assert [e["attention/step"] for e in entries(resumed)] == [0, 2, 4, 6, 8]
    assert first.monitor is not second.monitor
    a, b = (load_run(tmp_path / x / "entropy_monitor").scalars for x in ("whole", "cut"))
    pd.testing.assert_frame_equal(a.sort_values(["step", "name"]), b.sort_values(["step", "name"]))


class Sharpen(TrainerCallback):
    """Makes attention collapse."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if 8 < state.global_step < 25:
            with torch.no_grad():
                kwargs["model"].transformer.h[0].attn.c_attn.weight[:, :32].mul_(1.6)


def test_alerts_go_on_after_resume(tmp_path: Path) -> None:
    """An alert that was open when the checkpoint was made is open after it, and not told again."""
    options: dict[str, Any] = {
        "max_steps": 32,
        "save_strategy": "steps",
        "save_steps": 28,
        "learning_rate": 1e-5,
    }

    def callbacks(told: list[Any]) -> list[Any]:
        return [
            Sharpen(),
            EntropyMonitorCallback(every=1, on_alert=lambda a: told.append((a.id, a.severity))),
        ]

    told: list[Any] = []
    trainer(tmp_path, callbacks(told), **options).train()
    assert told
    again: list[Any] = []
    resumed = callbacks(again)
    trainer(tmp_path, resumed, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-28"))
    assert not set(told) & set(again)
    assert {a.id for a in resumed[1].monitor.open_alerts} == {alert_id for alert_id, _ in told}
    alerts = load_run(tmp_path / "entropy_monitor").alerts
    assert len(alerts) == len(set(alerts["id"])) == len({alert_id for alert_id, _ in told})


def test_checkpoints_without_a_state_start_alerts_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4}
    trainer(tmp_path, [], **options).train()
    resumed = trainer(tmp_path, [EntropyMonitorCallback(every=1)], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert "alerts start anew" in caplog.text
    assert sorted(load_run(tmp_path / "entropy_monitor").heads["step"].unique()) == [4, 5]


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    callback = EntropyMonitorCallback(every=1)
    run = trainer(tmp_path, [callback])
    names = set(run.model.state_dict())
    run.train()
    optimizer = run.optimizer.optimizer
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert set(run.model.state_dict()) == names
    assert not torch.nn.modules.module._global_forward_hooks
    assert callback.monitor is not None
    assert callback.monitor._closed


def test_training_twice(tmp_path: Path) -> None:
    run = trainer(tmp_path, [EntropyMonitorCallback(every=2)])
    run.train()
    run.train()
    assert load_run(tmp_path / "entropy_monitor").heads["step"].nunique() == 3


def test_another_model_in_the_same_output_dir(tmp_path: Path) -> None:
    trainer(tmp_path, [EntropyMonitorCallback(every=2)]).train()
    trainer(tmp_path, [EntropyMonitorCallback(every=2)], tiny(layers=1)).train()
    assert load_run(tmp_path / "entropy_monitor").heads["layer"].nunique() == 2
    assert load_run(tmp_path / "entropy_monitor-2").heads["layer"].nunique() == 1


BAD: list[dict[str, Any]] = [
    {"every": 0},
    {"rows": -1},
    {"loggers": "tensorboard"},
    {"loggers": [3]},
    {"on_alert": 3},
    {"thresholds": {}},
    {"owners": "attn"},
    {"run_dir": 7},
]


@pytest.mark.parametrize("bad", BAD, ids=lambda b: next(iter(b)))
def test_bad_arguments_raise_when_it_is_made(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(bad))):
        EntropyMonitorCallback(**bad)


def test_a_model_without_attention_raises_before_training(tmp_path: Path) -> None:
    class Nothing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(VOCABULARY, 1)

        def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": self.table(input_ids).square().mean()}

    model = Nothing()
    before = weights(model)
    with pytest.raises(AttentionNotFoundError):
        trainer(tmp_path, [EntropyMonitorCallback()], model).train()
    assert equal(before, weights(model))


def test_the_class_itself_may_be_given(tmp_path: Path) -> None:
    run = trainer(tmp_path, [EntropyMonitorCallback])
    run.train()
    assert len(entries(run)) == 1


def test_faults_of_the_monitor_stay_out_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: EntropyMonitor) -> dict[str, Any]:
        raise RuntimeError("no")

    monkeypatch.setattr(EntropyMonitor, "state_dict", broken)
    run = trainer(tmp_path, [EntropyMonitorCallback(every=1)], save_strategy="steps", save_steps=2)
    run.train()
    assert run.state.global_step == 6
    assert math.isfinite(entries(run)[0]["attention/all/entropy_mean"])
