"""The examples run as their first lines say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from entropy_monitor import load_run

ROOT = Path(__file__).parents[1]


def run(*command: str) -> str:
    everything = [sys.executable, *command]
    done = subprocess.run(everything, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_plain_loop(tmp_path: Path) -> None:
    out = run(str(ROOT / "examples" / "plain_loop.py"), "--steps", "12", "--run-dir", str(tmp_path / "run"))
    assert "encoder.layers.1.self_attn" in out
    kept = load_run(tmp_path / "run")
    assert sorted(kept.heads["step"].unique()) == [0, 10]
    assert len(kept.loss) == 12


def test_any_tracker(tmp_path: Path) -> None:
    out = run(str(ROOT / "examples" / "any_tracker.py"), "--steps", "12", "--run-dir", str(tmp_path / "run"))
    assert "metrics a step; entropy at step 10 is " in out
    lines = (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 10]
    heads = load_run(tmp_path / "run").heads
    least = heads[heads["step"] == 10]["entropy"].min()
    assert json.loads(lines[-1])["attention/all/entropy_min"] == pytest.approx(least)


def board(folder: Path, name: str) -> list[int]:
    """Steps at which TensorBoard has a scalar, in all event files below a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = []
    for path in folder.rglob("*tfevents*"):
        events = EventAccumulator(str(path))
        events.Reload()
        if name in events.Tags()["scalars"]:
            found += [e.step for e in events.Scalars(name)]
    return sorted(found)


def test_huggingface_trainer(tmp_path: Path) -> None:
    script = str(ROOT / "examples" / "huggingface_trainer.py")
    assert "step 10: mean entropy" in run(script, "--steps", "12", "--output-dir", str(tmp_path))
    assert "2 sessions" in run(script, "--steps", "32", "--output-dir", str(tmp_path), "--resume")
    kept = load_run(tmp_path / "entropy_monitor")
    assert sorted(kept.heads["step"].unique()) == [0, 10, 20, 30]
    assert board(tmp_path, "train/attention/layer_01/entropy_mean") == [1, 11, 21, 31]


def test_lightning_fit(tmp_path: Path) -> None:
    script, out = str(ROOT / "examples" / "lightning_fit.py"), str(tmp_path)
    run(script, "--steps", "12", "--output-dir", out)
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    assert "2 sessions" in run(script, "--steps", "32", "--output-dir", out, "--resume", str(checkpoint))
    (folder,) = tmp_path.rglob("entropy_monitor")
    assert sorted(load_run(folder).heads["step"].unique()) == [0, 10, 20, 30]
    assert board(tmp_path, "attention/layer_01/entropy_mean") == [0, 10, 20, 30]


def test_accelerate_loop(tmp_path: Path) -> None:
    out = run(str(ROOT / "examples" / "accelerate_loop.py"), "--steps", "24", "--output-dir", str(tmp_path))
    assert "Reader" in out
    kept = load_run(tmp_path / "entropy_monitor")
    assert sorted(kept.heads["step"].unique()) == [0, 10]
    assert len(kept.loss) == 12
    assert board(tmp_path, "attention/layer_01/entropy_mean") == [0, 10]
    assert (tmp_path / "checkpoint" / "custom_checkpoint_0.pkl").is_file()


def test_sibert(tmp_path: Path) -> None:
    out = run(str(ROOT / "examples" / "sibert.py"), "--steps", "12", "--run-dir", str(tmp_path / "run"))
    assert out.startswith("homogeneous of degree 0: scale-invariant")
    assert "effective learning rate" in out
    assert set(load_run(tmp_path / "run").heads["attention"]) == {"relu"}
