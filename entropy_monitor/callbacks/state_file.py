"""The monitor's state as a file in a framework's checkpoint: one for each rank."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from entropy_monitor import processes


def state_path(folder: Path) -> Path:
    """Where this rank's state lies in a checkpoint."""
    return folder / f"entropy_monitor-{processes.rank()}.json"


def write_state(folder: Path, state: Callable[[], Mapping[str, Any]]) -> None:
    """Put a state into a checkpoint, whole or not at all.

    Args:
        folder: the checkpoint's.
        state: gives the state, `EntropyMonitor.state_dict`.
    """
    path = state_path(folder)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(state()))
    os.replace(unfinished, path)  # noqa: PTH105


def read_state(folder: Path) -> dict[str, Any] | None:
    """The state in a checkpoint, None where there is none."""
    path = state_path(folder)
    if not path.is_file():
        return None
    state: dict[str, Any] = json.loads(path.read_text())
    return state
