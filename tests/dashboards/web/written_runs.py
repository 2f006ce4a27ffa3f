"""Runs on disk for the page's tests, written as a training writes them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from entropy_monitor.records import HEADS, LAYERS, SCALARS, AlertEvent, Record
from entropy_monitor.store import RunWriter
from tests.dashboards.records_factory import columns, event, head_row, info, layer_row

MAP = [[1.0, 0.0, 0.0], [0.25, 0.75, 0.0], [0.125, 0.125, 0.75]]


def begin(folder: Path) -> RunWriter:
    """A run that has started and written nothing of its tables."""
    writer = RunWriter(folder, flush_seconds=0)
    writer.open(info())
    return writer


def step(number: int, layers: Iterable[str] = ("blocks.0.attn", "blocks.1.attn"), heads: int = 3) -> Record:
    """A measured step; entropy falls with depth, head and step."""
    named = list(enumerate(layers))
    return Record(
        number,
        columns(HEADS, [head_row(number, i, h, layer=name) for i, name in named for h in range(heads)]),
        columns(LAYERS, [{**layer_row(number, i), "layer": name} for i, name in named]),
        columns(SCALARS, [{"step": number, "name": "loss", "value": 4.0 - number / 100}]),
    )


def alert(step: int, layer: str = "blocks.1.attn", **changes: Any) -> AlertEvent:
    """A severe alert that opens, with a map."""
    evidence = {"entropy_share": 0.04, "worst_head": 2, "call": 0, "map": MAP}
    fields = {
        "severity": "severe",
        "opened": step,
        "alert_id": f"entropy_collapse-{step}",
        "evidence": evidence,
    }
    return event("opened", step, layer=layer, **{**fields, **changes})


def write_run(
    folder: Path, steps: Iterable[int] = range(0, 60, 10), alerts: Iterable[AlertEvent] = (), **of_step: Any
) -> Path:
    """A run that ended; each alert stands after the record of its step."""
    writer = begin(folder)
    events = list(alerts)
    for number in steps:
        writer.log(step(number, **of_step))
        for each in events:
            if each.step == number:
                writer.alert(each)
    writer.close()
    return folder
