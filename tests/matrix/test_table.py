"""The compatibility table of the docs has the cells of the matrix, and says what their tests said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.matrix.__main__ import PAGE, ROOT
from tests.matrix.rules import Cell
from tests.matrix.table import cells_in, render

SMALL = """
import pytest

MODES = {"one": object(), "two": object()}

@pytest.mark.matrix(group="G", row="r", column="passes")
def test_passes(): pass

@pytest.mark.matrix(group="G", row="r", column="fails")
@pytest.mark.parametrize("x", [0, 1])
def test_fails(x): assert x

@pytest.mark.matrix(group="G", row="s", column="passes")
@pytest.mark.skipif(True, reason="needs CUDA")
def test_skipped(): pass

@pytest.mark.matrix(group="H", row="r", column="c")
@pytest.mark.parametrize("x", [0, pytest.param(1, marks=pytest.mark.skip(reason="needs POSIX folders"))])
def test_partly(x): pass

@pytest.mark.matrix(group="H", row="known", column="c")
@pytest.mark.xfail(strict=True)
def test_known(): assert False

def test_of_no_cell(): pass
"""


def run(folder: Path, *arguments: str) -> tuple[int, str, list[list[object]]]:
    (folder / "conftest.py").write_text(
        "from tests.matrix.plugin import pytest_addoption, pytest_collection_modifyitems\n"
        "from tests.matrix.plugin import pytest_collectreport, pytest_configure, pytest_runtest_logreport\n"
        "from tests.matrix.plugin import pytest_sessionfinish, pytest_terminal_summary\n"
    )
    (folder / "test_small.py").write_text(SMALL)
    out = folder / "out.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
    done = subprocess.run(
        [*command, "--matrix-out", str(out), "--rootdir", str(folder), *arguments, str(folder)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr, json.loads(out.read_text())


@pytest.mark.parametrize("processes", ["0", "2"])
def test_outcomes_of_a_small_matrix(processes: str, tmp_path: Path) -> None:
    _, text, rows = run(tmp_path, "-n", processes)
    outcomes = {Cell(*cell): found for *cell, found in rows}
    assert {cell: sorted(found) for cell, found in outcomes.items()} == {
        Cell("G", "r", "passes"): ["passed"],
        Cell("G", "r", "fails"): ["failed", "passed"],
        Cell("G", "s", "passes"): ["skipped"],
        Cell("H", "r", "c"): ["passed", "skipped"],
        Cell("H", "known", "c"): ["known failure"],
    }, text
    page = render(outcomes)
    assert cells_in(page) == set(outcomes)
    lines = page.splitlines()
    assert "| r | **no** (1) | yes |" in lines
    assert "| s |   | *not run*: needs CUDA |" in lines
    assert "| r | yes (3) |" in lines
    assert "| known | no (2) |" in lines
    assert any(line.startswith("3. in part not run: needs POSIX folders") for line in lines)


def test_a_skip_that_nobody_expects_fails_the_run(tmp_path: Path) -> None:
    allowed = ["--deselect", "test_small.py::test_fails", "-k", "not fails"]
    status, text, _ = run(tmp_path, "--no-unexpected-skips", *allowed)
    assert status == 0, text
    (tmp_path / "test_other.py").write_text("import pytest\npytest.importorskip('no_such_package')\n")
    for processes in ("0", "2"):
        status, text, _ = run(tmp_path, "--no-unexpected-skips", "-n", processes, *allowed)
        assert status == 1, text
        assert "unexpected skips" in text
        assert "no_such_package" in text
    status, text, _ = run(tmp_path, *allowed)
    assert status == 0, text


def test_the_page_has_every_cell_of_the_matrix(tmp_path: Path) -> None:
    """After a change of the matrix: make docs."""
    out = tmp_path / "cells.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "--matrix-only",
        "--matrix-out",
        str(out),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    expected = {Cell(*cell) for *cell, _ in json.loads(out.read_text())}
    written = cells_in(PAGE.read_text("utf-8"))
    assert len(expected) > 100
    assert written == expected, f"missing {sorted(expected - written)}, too many {sorted(written - expected)}"
