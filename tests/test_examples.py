"""The examples and benchmarks run as their first lines say."""

from __future__ import annotations

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


def test_overhead_prints_ratios() -> None:
    out = run(str(ROOT / "benchmarks" / "overhead.py"), "--smoke", "--rounds", "2")
    assert out.count("measured") == 2
    assert "default run" in out


def test_demo_seeds_prints_a_line_a_run() -> None:
    out = run(str(ROOT / "benchmarks" / "demo_seeds.py"), "--seeds", "3", "--steps", "4")
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["sound", "too-fast"]


@pytest.mark.xdist_group("demo")
def test_the_picture_of_the_readme(demo: object, tmp_path: Path) -> None:
    out = tmp_path / "picture.png"
    folder = demo.folder  # type: ignore[attr-defined]
    run(str(ROOT / "benchmarks" / "collapse_figure.py"), str(folder), "-o", str(out))
    assert out.read_bytes().startswith(b"\x89PNG")
