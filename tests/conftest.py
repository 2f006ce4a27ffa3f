"""What all tests share."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.matrix.plugin import (  # noqa: F401  hooks of pytest
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_collectreport,
    pytest_configure,
    pytest_runtest_logreport,
    pytest_sessionfinish,
    pytest_terminal_summary,
)

DEMO_STEPS = 250


torch.set_num_threads(1)  # the tests run in parallel: torch's own threads would only fight over the cores


@dataclass(frozen=True)
class Demo:
    """A demonstration that ran: its folder and what it printed."""

    folder: Path
    output: str


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The demonstration, shortened, run as a user would; its users belong to the xdist group `demo`."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    command = ["-m", "entropy_monitor.cli", "demo", "-o", str(folder), "--steps", str(DEMO_STEPS)]
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Demo(folder, done.stdout)
