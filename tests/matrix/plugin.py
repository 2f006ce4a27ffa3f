"""Pytest's part of the matrix; `tests/conftest.py` hands these hooks on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.matrix.rules import Cell, cells_of

# Why a test may be skipped, as its reason says; anything else is a gap in what was installed, or a mistake.
ALLOWED_SKIPS = (
    "needs CUDA",
    "needs flash-attn",
    "needs xformers",
    "needs chromium",  # `.ci/run` forbids this one: ENTROPY_MONITOR_REQUIRE=chromium
    "needs fork",
    "needs POSIX folders",
    "POSIX only",
    "Linux only",
)

_PROPERTY = "matrix"


class Outcomes:
    """What became of the tests: by cell, and which skips nobody expected."""

    def __init__(self) -> None:
        self.cells: set[Cell] = set()
        self.by_cell: dict[Cell, dict[str, list[str]]] = {}
        self.unexpected: list[str] = []

    def add(self, report: pytest.TestReport) -> None:
        """Take note of one phase of a test."""
        outcome = _outcome(report)
        if outcome is None:
            return
        for name, value in report.user_properties:
            if name == _PROPERTY:
                found = self.by_cell.setdefault(Cell(*value), {})  # type: ignore[misc]
                found.setdefault(outcome, []).append(
                    _reason(report) if outcome == "skipped" else report.nodeid
                )

    def note_skip(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        """Take note of a skip that is not allowed."""
        if not report.skipped or hasattr(report, "wasxfail"):
            return
        reason = _reason(report)
        if not any(allowed in reason for allowed in ALLOWED_SKIPS):
            self.unexpected.append(f"{report.nodeid}: {reason}")

    def write(self, path: Path) -> None:
        """Keep what became of the cells; of those that were only collected, nothing."""
        rows = [[*cell, self.by_cell.get(cell, {})] for cell in sorted(self.cells | set(self.by_cell))]
        path.write_text(json.dumps(rows), "utf-8")


def _outcome(report: pytest.TestReport) -> str | None:
    """Passed, failed or skipped; None for a phase that says nothing of itself."""
    if hasattr(report, "wasxfail"):
        return "known failure" if report.skipped else "failed"
    if report.when == "call" or report.outcome != "passed":
        return str(report.outcome)
    return None


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


_outcomes = Outcomes()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("matrix", "the test matrix")
    group.addoption(
        "--no-unexpected-skips", action="store_true", help="fail where a skip is not an allowed one"
    )
    group.addoption(
        "--matrix-out", type=Path, help="write the outcomes of the matrix's cells to this file, as JSON"
    )
    group.addoption("--matrix-only", action="store_true", help="leave out tests that are not in the matrix")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "matrix(group, row, column): speaks for a cell of the compatibility table"
    )
    config.addinivalue_line("markers", "full: part of the matrix that only `make test-all` runs")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, left_out = [], []
    for item in items:
        cells = cells_of(item)
        for cell, quick in cells:
            item.user_properties.append((_PROPERTY, list(cell)))
            _outcomes.cells.add(cell)
            if not quick:
                item.add_marker("full")
        (kept if cells or not config.getoption("--matrix-only") else left_out).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _outcomes.add(report)
    _outcomes.note_skip(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _outcomes.note_skip(report)


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> Iterator[None]:
    del exitstatus
    config = session.config
    if not hasattr(config, "workerinput"):  # the controller sees every worker's reports
        path = config.getoption("--matrix-out")
        if path is not None:
            _outcomes.write(path)
        if config.getoption("--no-unexpected-skips") and _outcomes.unexpected and session.exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
    return (yield)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.getoption("--no-unexpected-skips") and _outcomes.unexpected:
        terminalreporter.section("unexpected skips")
        for line in _outcomes.unexpected:
            terminalreporter.line(line)
