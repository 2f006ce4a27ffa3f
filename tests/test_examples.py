"""The examples and benchmarks run as their first lines say."""

from __future__ import annotations

import re
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


def test_remedies_prints_ratios() -> None:
    out = run(str(ROOT / "benchmarks" / "remedies.py"), "--smoke", "--rounds", "2", "--eager-only")
    assert out.count("| smoke | eager |") == 2


def test_proposition_3_2_holds_its_bound() -> None:
    out = run(
        str(ROOT / "benchmarks" / "proposition_3_2.py"),
        "--widths",
        "16",
        "64",
        "--steps",
        "1",
        "--samples",
        "8",
        "--seeds",
        "1",
    )
    assert "in all 2 cases: True" in out
    assert out.count("| exponent |") == 1


def test_cures_prints_a_line_a_run() -> None:
    out = run(str(ROOT / "benchmarks" / "cures.py"), "1", "--steps", "3")
    assert len(out.splitlines()) == 2 + 8


def rows_of(table: str) -> dict[str, list[str]]:
    """The cells of every row of Markdown tables, by the first cell; those of a later table take over."""
    lines = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_cost_prints_a_row_a_contender() -> None:
    out = run(str(ROOT / "benchmarks" / "cost.py"), "--smoke")
    assert out.splitlines()[0].count("torch ") == 1
    parts = re.split("Errors in nats|## What else", out)
    costs, errors, effects = (rows_of(part) for part in parts)
    contenders = {
        "attention written out, maps returned",
        "extra forward with maps",
        "torch-module-monitor",
        "ours, rows=32",
        'ours, rows="auto"',
        'ours, rows="all"',
    }
    assert set(costs) == contenders | {"contender", "---", "plain", "plain again"}
    assert set(effects) == set(errors) == contenders | {"contender", "---"}
    for name in contenders - {"torch-module-monitor"}:  # which is optional
        measured, in_full, between, whole, memory = costs[name]
        rows, fresh, collapsed = errors[name]
        assert all("…" in cell for cell in (measured, between)), costs[name]
        assert ("…" in in_full) == name.startswith("ours")
        assert float(whole) > 0
        assert int(memory) >= -100
        assert rows == "32"  # all of them
        for error in (fresh, collapsed):
            assert float(error.split("/")[0]) < 0.05, name
    for name in contenders:
        if name.startswith("ours"):
            assert "bit-identical" not in effects[name][0]
            assert "random state" not in effects[name][0]
    assert "not bit-identical" in effects["attention written out, maps returned"][0]
    assert "heads below 10%" in out


def test_scale_prints_its_tables_and_draws_them(tmp_path: Path) -> None:
    picture = tmp_path / "scale.png"
    out = run(str(ROOT / "benchmarks" / "scale.py"), "--smoke", "-o", str(picture))
    rows = rows_of(out)
    assert {"64", "128", "10", "20", "1", "2", "100", "1,000"} <= set(rows)
    assert rows["1,000"][0] == "9,600"
    assert out.count("exponent (expected)") == 4
    assert "Both answers agree: True." in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_demo_seeds_prints_a_line_a_run() -> None:
    out = run(str(ROOT / "benchmarks" / "demo_seeds.py"), "--seeds", "3", "--steps", "4")
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["sound", "too-fast", "cured"]


@pytest.mark.xdist_group("demo")
def test_the_picture_of_the_readme(demo: object, tmp_path: Path) -> None:
    out = tmp_path / "picture.png"
    folder = demo.folder  # type: ignore[attr-defined]
    run(str(ROOT / "benchmarks" / "collapse_figure.py"), str(folder), "-o", str(out))
    assert out.read_bytes().startswith(b"\x89PNG")
