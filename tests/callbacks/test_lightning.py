"""The callback in real fits of a tiny module, under both names of Lightning."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch
import pandas as pd
import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from entropy_monitor import ConfigurationError, EntropyMonitor, load_run
from entropy_monitor.callbacks.lightning import EntropyMonitorCallback
from tests.training import CLASSES, TOKENS, WIDTH, ListSink, tiny

PACKAGES = {"lightning": lightning.pytorch, "pytorch_lightning": pytorch_lightning}
BATCHES = 12

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def quiet() -> None:
    for name in ("lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def loader() -> Any:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4 * BATCHES, TOKENS, WIDTH, generator=generator)
    return DataLoader(
        TensorDataset(x, torch.randint(0, CLASSES, (len(x),), generator=generator)), batch_size=4
    )


def module(package: Any, manual: bool = False, optimizers: int = 1, dropout: float = 0.1) -> Any:
    class Module(package.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny(dropout=dropout)
            self.automatic_optimization = not manual
            self.losses: list[Tensor] = []

        def loss(self, batch: Any) -> Tensor:
            x, y = batch
            loss = F.cross_entropy(self.model(x), y)
            if self.training:
                self.losses.append(loss.detach())
            return loss

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.log("loss", loss)
            if manual:
                found = self.optimizers()
                for i, optimizer in enumerate(found if isinstance(found, list) else [found]):
                    optimizer.zero_grad()
                    self.manual_backward(loss if i == 0 else self.loss(batch))
                    optimizer.step()
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.loss(batch))

        def configure_optimizers(self) -> Any:
            if optimizers == 1:
                return torch.optim.AdamW(self.parameters(), 0.01)
            return [torch.optim.SGD(b.parameters(), 0.1) for b in self.model.blocks]

    torch.manual_seed(3)
    return Module()


def trainer(package: Any, folder: Path, callbacks: list[Any], **options: Any) -> Any:
    plain: dict[str, Any] = {
        "accelerator": "cpu",
        "max_steps": 6,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 1,
        "val_check_interval": 3,
    }
    return package.Trainer(default_root_dir=folder, callbacks=callbacks, **{**plain, **options})


def weights(of: Any) -> list[Tensor]:
    return [p.detach().clone() for p in of.parameters()]


def equal(one: list[Tensor], two: list[Tensor]) -> bool:
    return len(one) == len(two) and all(map(torch.equal, one, two))


MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "accumulation": ({}, {"accumulate_grad_batches": 2}),
    "bf16": ({}, {"precision": "bf16-mixed"}),
    "clipping": ({}, {"gradient_clip_val": 0.1}),
    "manual": ({"manual": True}, {}),
    "epochs": ({}, {"max_steps": -1, "max_epochs": 2}),
}


@pytest.mark.parametrize("package", PACKAGES.values(), ids=list(PACKAGES))
@pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))
def test_on_equals_off(mode: tuple[dict[str, Any], dict[str, Any]], package: Any, tmp_path: Path) -> None:
    made, options = mode
    data = loader()
    off = module(package, **made)
    trainer(package, tmp_path / "off", [], **options).fit(off, data, data)
    random = torch.get_rng_state()
    on, callback = module(package, **made), EntropyMonitorCallback(every=2)
    run = trainer(package, tmp_path / "on", [callback], **options)
    run.fit(on, data, data)
    assert torch.equal(random, torch.get_rng_state())
    assert equal(weights(off), weights(on))
    assert callback.monitor is not None
    assert callback.monitor.faults == {}
    kept = load_run(tmp_path / "on" / "entropy_monitor")
    assert sorted(kept.heads["step"].unique()) == list(range(0, run.global_step, 2))
    assert set(kept.heads["layer"]) == {"model.blocks.0", "model.blocks.1"}
    assert set(kept.heads["rows_read"]) == {4 * TOKENS * options.get("accumulate_grad_batches", 1)}
    assert kept.layers["grad_l2"][kept.layers["sigma_q"].notna()].notna().all()
    size = options.get("accumulate_grad_batches", 1)
    losses = torch.stack(on.losses).float().reshape(-1, size).mean(-1)
    assert list(kept.loss.index) == list(range(run.global_step))
    assert kept.loss.to_numpy() == pytest.approx(losses.numpy())


def test_several_optimizers_count_as_the_loggers_do(tmp_path: Path) -> None:
    package = lightning.pytorch
    run = trainer(package, tmp_path, [EntropyMonitorCallback(tmp_path / "run", every=2)], max_steps=8)
    run.fit(module(package, manual=True, optimizers=2), loader())
    assert run.global_step == 8
    kept = load_run(tmp_path / "run")
    assert sorted(kept.heads["step"].unique()) == [0, 2]  # of four batches, as the loggers count
    assert kept.layers["grad_l2"][kept.layers["sigma_q"].notna()].notna().all()


@pytest.mark.parametrize("package", PACKAGES.values(), ids=list(PACKAGES))
def test_metrics_reach_the_loggers_at_lightnings_own_step(package: Any, tmp_path: Path) -> None:
    board = package.loggers.TensorBoardLogger(tmp_path, name="tb")
    table = package.loggers.CSVLogger(tmp_path, name="csv")
    callback = EntropyMonitorCallback(tmp_path / "run", every=2, loggers=[ListSink()])
    options: dict[str, Any] = {"logger": [board, table], "log_every_n_steps": 1, "accumulate_grad_batches": 2}
    run = trainer(package, tmp_path, [callback], **options)
    run.fit(module(package), loader())
    events = EventAccumulator(board.log_dir)
    events.Reload()
    losses = {e.step for e in events.Scalars("loss")}
    heads = load_run(tmp_path / "run").heads
    written = events.Scalars("attention/layer_01/entropy_mean")
    assert [e.step for e in written] == [0, 2, 4]
    assert {e.step for e in written} <= losses
    assert [e.value for e in events.Scalars("attention/step")] == [0, 2, 4]
    rows = heads[heads["layer_index"] == 1].groupby("step")["entropy"].mean()
    assert [e.value for e in written] == pytest.approx(rows.to_list())
    assert [e.value for e in events.Scalars("attention/open_alerts")] == [0, 0, 0]
    sheet = pd.read_csv(Path(table.log_dir) / "metrics.csv")
    column = sheet[["step", "attention/all/entropy_min"]].dropna()
    assert column["step"].to_list() == [0, 2, 4]
    least = heads.groupby("step")["entropy"].min()
    assert column["attention/all/entropy_min"].to_list() == pytest.approx(least.to_list())


@pytest.mark.parametrize("package", PACKAGES.values(), ids=list(PACKAGES))
def test_resume_continues(package: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 10, "limit_train_batches": 5}
    data = loader()
    whole = module(package, dropout=0.0)
    trainer(package, tmp_path, [EntropyMonitorCallback(tmp_path / "whole", every=2)], **options).fit(
        whole, data
    )

    class Preempted(package.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 7:
                raise KeyboardInterrupt

    first = EntropyMonitorCallback(every=2)
    saving = package.callbacks.ModelCheckpoint(tmp_path / "kept", filename="{step}", every_n_train_steps=5)
    saving_options = {**options, "enable_checkpointing": True}
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer(package, tmp_path / "cut", [first, Preempted(), saving], **saving_options).fit(
            module(package, dropout=0.0), data
        )
    assert first.monitor is not None
    assert first.monitor._closed
    assert load_run(first.monitor.run_dir).heads["step"].max() == 6
    second, resumed = EntropyMonitorCallback(every=2), module(package, dropout=0.0)
    # not the folder of before: the checkpoint says where the run is
    run = trainer(package, tmp_path / "again", [second], **options)
    run.fit(resumed, data, ckpt_path=tmp_path / "kept" / "step=5.ckpt")
    assert second.monitor is not None
    assert second.monitor.run_dir == first.monitor.run_dir == tmp_path / "cut" / "entropy_monitor"
    assert equal(weights(whole), weights(resumed))
    by = ["step", "layer", "call", "head"]
    a, b = (load_run(f).heads.sort_values(by) for f in (tmp_path / "whole", second.monitor.run_dir))
    pd.testing.assert_frame_equal(a.reset_index(drop=True), b.reset_index(drop=True))
    c, d = (load_run(f).loss for f in (tmp_path / "whole", second.monitor.run_dir))
    pd.testing.assert_series_equal(c, d)


def test_a_second_fit_has_a_run_of_its_own(tmp_path: Path) -> None:
    package, callback = lightning.pytorch, EntropyMonitorCallback(every=3)
    run = trainer(package, tmp_path, [callback])
    run.fit(module(package), loader())
    trainer(package, tmp_path, [callback]).fit(module(package), loader())
    for name in ("entropy_monitor", "entropy_monitor-2"):
        assert sorted(load_run(tmp_path / name).heads["step"].unique()) == [0, 3]


def test_an_error_of_the_training_comes_through_and_nothing_is_left(tmp_path: Path) -> None:
    package = lightning.pytorch
    broken = module(package)
    step = type(broken).training_step

    def fails(self: Any, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 4:
            raise ValueError("of the user's own")
        return step(self, batch, batch_idx)

    type(broken).training_step = fails
    callback = EntropyMonitorCallback(tmp_path / "run", every=1)
    run = trainer(package, tmp_path, [callback])
    names = set(broken.state_dict())
    with pytest.raises(ValueError, match="of the user's own"):
        run.fit(broken, loader())
    assert callback.monitor is not None
    assert callback.monitor._closed
    assert not torch.nn.modules.module._global_forward_hooks
    assert set(broken.state_dict()) == names
    assert load_run(tmp_path / "run").heads["step"].max() == 3


def test_faults_stay_out_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = lightning.pytorch

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no")

    monkeypatch.setattr(EntropyMonitor, "state_dict", broken)
    monkeypatch.setattr(package.loggers.CSVLogger, "log_metrics", broken)
    run = trainer(
        package,
        tmp_path,
        [EntropyMonitorCallback(every=1)],
        logger=package.loggers.CSVLogger(tmp_path),
        log_every_n_steps=100,
    )
    run.fit(module(package), loader())
    run.save_checkpoint(tmp_path / "x.ckpt")
    assert run.global_step == 6


def test_validation_alone_makes_no_monitor(tmp_path: Path) -> None:
    package, callback = lightning.pytorch, EntropyMonitorCallback()
    trainer(package, tmp_path, [callback]).validate(module(package), loader(), verbose=False)
    assert callback.monitor is None
    assert callback.state_dict() == {}


def test_it_is_a_callback_of_both() -> None:
    callback = EntropyMonitorCallback()
    for package in PACKAGES.values():
        assert isinstance(callback, package.Callback)
        assert package.Trainer(callbacks=callback, logger=False, accelerator="cpu").callbacks[0] is callback


BAD: list[dict[str, Any]] = [
    {"every": 0},
    {"rows": 1.5},
    {"loggers": [3]},
    {"on_alert": 3},
    {"run_dir": 7},
]


@pytest.mark.parametrize("bad", BAD, ids=lambda b: next(iter(b)))
def test_bad_arguments_raise_when_it_is_made(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(bad))):
        EntropyMonitorCallback(**bad)
