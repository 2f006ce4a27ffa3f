"""Runs written without a training, for the commands' tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from entropy_monitor.records import AlertEvent
from entropy_monitor.store import RunWriter
from tests.dashboards.records_factory import event, info, record


def write_run(folder: Path, events: Sequence[AlertEvent] = (), *, steps: int = 6, share: float = 0.8) -> Path:
    """A run of 2 layers and 4 heads, measured at every tenth step, its entropy falling to `share`."""
    store = RunWriter(folder)
    store.open(info(str(folder)))
    for step in range(0, 10 * steps, 10):
        entropy = 2.77 * (1 - (1 - share) * step / (10 * (steps - 1)))
        store.log(record(step, entropy=entropy, sigma_qk=1.0 + step / 10, max_logit=2.0 + step))
    for happened in events:
        store.alert(happened)
    store.close()
    return folder


def write_runs(folder: Path) -> Path:
    """Three runs: `sound`, `watch` with a warning, and `ill` with a severe alert that is open."""
    write_run(folder / "sound")
    write_run(folder / "watch", [event(opened=20, step=20), event("closed", 40, opened=20)], share=0.4)
    ill = {"severity": "severe", "opened": 10, "title": "Entropy has collapsed in blocks.0.attn"}
    write_run(folder / "ill", [event(step=10, **ill), event("updated", 50, **ill)], share=0.02)  # type: ignore[arg-type]
    return folder
