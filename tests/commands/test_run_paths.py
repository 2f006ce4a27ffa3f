from __future__ import annotations

from pathlib import Path

import pytest

from entropy_monitor.commands.run_paths import names_of, run_paths


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("a", "b", "deep/er/c", "a/inner"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "run.json").touch()
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_runs_stand_for_themselves_and_folders_for_the_runs_below(tree: Path) -> None:
    assert run_paths([tree / "b", tree / "a"]) == [tree / "b", tree / "a"]
    assert run_paths([tree]) == [tree / name for name in ("a", "a/inner", "b", "deep/er/c")]
    assert run_paths([tree / "deep"]) == [tree / "deep/er/c"]


def test_none_comes_twice(tree: Path) -> None:
    assert run_paths([tree / "b", tree / "a", tree / "empty/../b"]) == [tree / "b", tree / "a"]


def test_what_holds_no_run_is_left_for_others_to_refuse(tree: Path) -> None:
    assert run_paths([tree / "empty", tree / "none"]) == [tree / "empty", tree / "none"]


def test_names_are_told_apart(tree: Path) -> None:
    paths = [tree / "a", tree / "x" / "a", tree / "b"]
    assert names_of(paths) == [str(tree / "a"), str(tree / "x" / "a"), "b"]
