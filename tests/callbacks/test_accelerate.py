"""`attach` in real loops with an `Accelerator`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import set_seed
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from entropy_monitor import ConfigurationError, EntropyMonitor, load_run
from entropy_monitor.callbacks.accelerate import attach
from entropy_monitor.errors import AttentionNotFoundError
from tests.training import CLASSES, TOKENS, WIDTH, ListSink, tiny

BATCHES = 12


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Accelerate keeps its state for the whole process."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


class Loop:
    """A training with an accelerator, as its manual shows it."""

    def __init__(
        self, folder: Path, watch: dict[str, Any] | None, dropout: float = 0.1, **options: Any
    ) -> None:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        self.accelerator = Accelerator(cpu=True, project_dir=str(folder), **options)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(4 * BATCHES, TOKENS, WIDTH, generator=generator)
        y = torch.randint(0, CLASSES, (len(x),), generator=generator)
        model = tiny(dropout=dropout)
        made = torch.optim.AdamW(model.parameters(), 0.01), DataLoader(TensorDataset(x, y), batch_size=4)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, *made)
        self.monitor = None
        if watch is not None:
            self.monitor = attach(self.accelerator, self.model, self.optimizer, **watch)
        self.losses: list[float] = []
        self.reports: list[Any] = []
        set_seed(3)

    def train(self, first: int = 0, last: int = BATCHES, log: bool = False) -> None:
        for i, (x, y) in enumerate(self.loader):
            if not first <= i < last:
                continue
            with self.accelerator.accumulate(self.model):
                loss = F.cross_entropy(self.model(x), y)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.losses.append(loss.item())
                if log:
                    self.accelerator.log({"mine": loss.item()}, step=i)
                if self.monitor is not None:
                    self.reports.append(self.monitor.step(loss))
            if i % 3 == 2:
                self.model.eval()
                with torch.no_grad():
                    self.model(x)
                self.model.train()

    @property
    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.accelerator.unwrap_model(self.model).parameters()]


def equal(one: list[Tensor], two: list[Tensor]) -> bool:
    return len(one) == len(two) and all(map(torch.equal, one, two))


MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "bf16": {"mixed_precision": "bf16"},
}


@pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))
def test_on_equals_off(mode: dict[str, Any], tmp_path: Path) -> None:
    off = Loop(tmp_path / "off", None, **mode)
    off.train()
    random = torch.get_rng_state()
    on = Loop(tmp_path / "on", {"every": 2}, **mode)
    on.train()
    assert torch.equal(random, torch.get_rng_state())
    assert equal(off.weights, on.weights)
    assert off.losses == on.losses
    assert on.monitor is not None
    on.monitor.close()
    assert on.monitor.faults == {}
    size = mode.get("gradient_accumulation_steps", 1)
    kept = load_run(tmp_path / "on" / "entropy_monitor")
    assert sorted(kept.heads["step"].unique()) == list(range(0, BATCHES // size, 2))
    assert set(kept.heads["rows_read"]) == {4 * TOKENS * size}
    assert set(kept.heads["layer"]) == {"blocks.0", "blocks.1"}
    assert kept.layers["grad_l2"][kept.layers["sigma_q"].notna()].notna().all()
    means = torch.tensor(on.losses).reshape(-1, size).mean(-1)
    assert kept.loss.to_numpy() == pytest.approx(means.numpy())
    assert [r.step for r in on.reports] == [i // size for i in range(BATCHES)]
    assert not torch.nn.modules.module._global_forward_hooks


def test_metrics_reach_tensorboard(tmp_path: Path) -> None:
    loop = Loop(tmp_path, {"every": 4, "loggers": [ListSink()]}, log_with="tensorboard")
    loop.accelerator.init_trackers("project")
    loop.train()
    assert loop.monitor is not None
    loop.monitor.close()
    loop.accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "project"))
    events.Reload()
    heads = load_run(tmp_path / "entropy_monitor").heads
    expected = heads[heads["layer_index"] == 0].groupby("step")["entropy"].mean()
    written = events.Scalars("attention/layer_00/entropy_mean")
    assert [e.step for e in written] == [0, 4, 8] == list(expected.index)
    assert [e.value for e in written] == pytest.approx(expected.to_list())
    assert [e.value for e in events.Scalars("attention/open_alerts")] == [0, 0, 0]


@pytest.mark.parametrize("by_epoch", [False, True])
def test_metrics_join_the_users_own_rows_in_wandb(
    by_epoch: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the user counts, nothing of theirs is dropped."""
    import wandb

    from tests.dashboards.test_wandb_logger import Recording

    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "home").mkdir()
    loop = Loop(tmp_path / "loop", {"every": 2}, log_with="wandb")
    loop.accelerator.init_trackers("project", init_kwargs={"wandb": {"dir": str(tmp_path)}})
    if by_epoch:
        for epoch in range(3):
            loop.train()
            loop.accelerator.log({"mine": epoch}, step=epoch)
    else:
        loop.train(log=True)
    assert loop.monitor is not None
    loop.monitor.close()
    loop.accelerator.end_training()
    wandb.teardown()
    rows = [r for r in Recording(tmp_path).rows if "mine" in r]
    if by_epoch:
        assert [(r["_step"], r["mine"]) for r in rows] == [(0, 0), (1, 1), (2, 2)]
        assert [r["attention/step"] for r in rows if "attention/step" in r] == [22, 34]
        return
    assert [r["mine"] for r in rows] == pytest.approx(loop.losses)
    found = {r["_step"]: r for r in rows if "attention/step" in r}
    assert list(found) == [0, 2, 4, 6, 8, 10] == [r["attention/step"] for r in found.values()]
    heads = load_run(tmp_path / "loop" / "entropy_monitor").heads
    least = heads.groupby("step")["entropy"].min()
    assert [r["attention/all/entropy_min"] for r in found.values()] == pytest.approx(least.to_list())


def test_resume_continues(tmp_path: Path) -> None:
    whole = Loop(tmp_path / "whole", {"every": 2}, dropout=0.0)
    whole.train()
    assert whole.monitor is not None
    whole.monitor.close()
    cut = Loop(tmp_path / "cut", {"every": 2}, dropout=0.0)
    cut.train(last=5)
    cut.accelerator.save_state(str(tmp_path / "checkpoint"))
    cut.train(first=5, last=7)
    assert cut.monitor is not None
    cut.monitor.close()
    resumed = Loop(tmp_path / "cut", {"every": 2}, dropout=0.0)
    resumed.accelerator.load_state(str(tmp_path / "checkpoint"))
    resumed.train(first=5)
    assert resumed.monitor is not None
    resumed.monitor.close()
    assert equal(whole.weights, resumed.weights)
    by = ["step", "layer", "call", "head"]
    a, b = (load_run(tmp_path / x / "entropy_monitor") for x in ("whole", "cut"))
    one, two = (r.heads.sort_values(by).reset_index(drop=True) for r in (a, b))
    pd.testing.assert_frame_equal(one, two)
    pd.testing.assert_series_equal(a.loss, b.loss)


def test_it_is_an_entropy_monitor_and_a_context_manager(tmp_path: Path) -> None:
    loop = Loop(tmp_path, {"every": 1})
    assert isinstance(loop.monitor, EntropyMonitor)
    assert loop.monitor in loop.accelerator._custom_objects
    with loop.monitor:
        loop.train(last=2)
    assert not loop.optimizer.optimizer._optimizer_step_pre_hooks


def test_a_tracker_that_raises_does_no_harm(tmp_path: Path) -> None:
    loop = Loop(tmp_path, {"every": 1}, log_with="tensorboard")
    loop.accelerator.init_trackers("project")
    loop.accelerator.trackers[0].writer.close()
    del loop.accelerator.trackers[0].writer
    loop.train()
    assert [r.step for r in loop.reports] == list(range(BATCHES))
    assert loop.monitor is not None
    loop.monitor.close()


BAD: list[dict[str, Any]] = [
    {"every": 0},
    {"rows": 1.5},
    {"loggers": [3]},
    {"on_alert": 3},
    {"run_dir": 7},
    {"optimizer": "adam"},
    {"model": 3},
    {"accelerator": None},
]


@pytest.mark.parametrize("bad", BAD, ids=lambda b: next(iter(b)))
def test_bad_arguments_raise_at_once(bad: dict[str, Any], tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    good: dict[str, Any] = {"accelerator": accelerator, "model": tiny(), "run_dir": tmp_path}
    with pytest.raises(ConfigurationError, match=next(iter(bad))):
        attach(**{**good, **bad})
    assert accelerator._custom_objects == []


def test_a_model_without_attention_raises_at_once(tmp_path: Path) -> None:
    with pytest.raises(AttentionNotFoundError):
        attach(Accelerator(cpu=True), nn.Linear(2, 2), run_dir=tmp_path)
