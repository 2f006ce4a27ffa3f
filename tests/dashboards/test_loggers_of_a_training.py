"""All loggers of one training, read back: they show what the run directory holds, at the same steps."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from entropy_monitor import EntropyMonitor, load_run
from entropy_monitor.dashboards import TensorBoardLogger, WandbLogger
from tests.dashboards.test_wandb_logger import Recording
from tests.training import tiny, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose attention collapses, since its queries are made ever larger."""
    folder = tmp_path_factory.mktemp("loggers")
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    given: dict[int, dict[str, float]] = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
            patch.delenv(name)
        patch.setenv("HOME", str(folder))
        with EntropyMonitor(
            model,
            optimizer=optimizer,
            run_dir=folder / "run",
            every=2,
            rows="all",
            loggers=[
                TensorBoardLogger(folder / "tb", heatmap_every=1),
                WandbLogger(dir=folder, mode="offline"),
                lambda metrics, step: given.update({step: metrics}),
            ],
        ) as monitor:

            def after(loss: torch.Tensor) -> None:
                monitor.step(loss)
                with torch.no_grad():
                    model.blocks[0].q.weight.mul_(1.15)

            train(model, optimizer, 120, after)
        assert not monitor.faults
        assert not monitor.dropped
        wandb.teardown()
    pd.to_pickle(given, folder / "given.pickle")
    return folder


@pytest.fixture(scope="module")
def board(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder / "tb"), size_guidance={"images": 0, "histograms": 0})
    events.Reload()
    return events


@pytest.fixture(scope="module")
def recording(folder: Path) -> Recording:
    return Recording(folder)


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, dict[int, float]]:
    """From the run directory: name to step to value."""
    heads = load_run(folder / "run").heads
    by_layer = heads.groupby(["layer_index", "step"])
    named: dict[str, Any] = {}
    for name, column, how in (
        ("entropy_mean", "entropy", "mean"),
        ("entropy_min", "entropy", "min"),
        ("max_logit", "max_logit", "max"),
        ("sigma_qk_max", "sigma_qk", "max"),
    ):
        table = by_layer[column].agg(how).dropna()
        for index in (0, 1):
            named[f"attention/layer_{index:02d}/{name}"] = table.loc[index].to_dict()
    named["attention/all/entropy_min"] = heads.groupby("step")["entropy"].min().to_dict()
    return named


def test_tensorboard_has_it(board: EventAccumulator, expected: dict[str, dict[int, float]]) -> None:
    for name, values in expected.items():
        assert {e.step: e.value for e in board.Scalars(name)} == pytest.approx(values, rel=1e-6)
    steps = [e.step for e in board.Images("attention/entropy_share")]
    assert steps[:9] == list(range(0, 18, 2))  # rarer from there on
    assert steps[-1] > 80
    assert all(sum(e.histogram_value.bucket) == 4 for e in board.Histograms("attention/heads/max_logit"))
    assert {e.step for e in board.Scalars("train/loss")} == set(range(120))


def test_wandb_has_it(recording: Recording, expected: dict[str, dict[int, float]]) -> None:
    for name, values in expected.items():
        found = {row["attention/step"]: float(row[name]) for row in recording.rows if name in row}
        assert found == pytest.approx(values, rel=1e-6)


def test_a_function_has_it(folder: Path, expected: dict[str, dict[int, float]]) -> None:
    given = pd.read_pickle(folder / "given.pickle")
    for name, values in expected.items():
        found = {step: metrics[name] for step, metrics in given.items() if name in metrics}
        assert found == pytest.approx(values, rel=1e-6)


def test_alerts_are_told_by_all(folder: Path, board: EventAccumulator, recording: Recording) -> None:
    alerts = load_run(folder / "run").alerts
    assert set(alerts["severity"]) == {"severe"}
    still_open = int(alerts["closed"].isna().sum())
    assert board.Scalars("attention/open_alerts")[-1].value == still_open
    table = board.Tensors("attention/alerts/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert table.replace("&#45;", "-").count(" - severe, ") == len(alerts)
    summary = recording.summary
    assert summary["attention/verdict"] == "trouble"
    assert summary["attention/alerts_severe"] == len(alerts)
    assert summary["attention/open_alerts"] == still_open
    assert summary["attention/first_alert_step"] == alerts["opened"].min()
    assert {alert["level"] for alert in recording.alerts} <= {"WARN", "ERROR"}
    assert recording.alerts


def test_the_summary_is_that_of_the_run(folder: Path, recording: Recording) -> None:
    heads = load_run(folder / "run").heads
    share = heads["entropy"] / heads["max_entropy"]
    row = heads.loc[share.idxmin()]
    assert recording.summary["attention/lowest_share"] == pytest.approx(share.min(), rel=1e-6)
    where = f"{row['layer']}, head {row['head']}, step {row['step']}"
    assert recording.summary["attention/lowest_share_at"] == where
    assert recording.summary["attention/largest_logit"] == pytest.approx(heads["max_logit"].max(), rel=1e-6)
    first = heads.groupby(["layer", "head"])["sigma_qk"].transform("first")
    growth = (heads["sigma_qk"] / first).max()
    assert math.isfinite(growth)
    assert recording.summary["attention/sigma_growth"] == pytest.approx(growth, rel=1e-5)
