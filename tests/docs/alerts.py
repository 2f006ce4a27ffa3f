"""The alerts that the catalogue shows, as the analyzer words them: of recorded runs where there are such."""

from __future__ import annotations

import math

from entropy_monitor.analyzer import Analyzer
from entropy_monitor.records import Alert, Record
from tests.analyzer.series import digits, keys, play, record


def shown() -> dict[str, Alert]:
    """One alert of each kind, as it opens."""
    runs = {
        "entropy_collapse": digits("collapse"),
        "logit_explosion": digits("collapse"),
        "uniform_attention": digits("stuck"),
        "non_finite": _broken(),
        "capture_fault": _misread(),
    }
    return {kind: _first(kind, records) for kind, records in runs.items()}


def _first(kind: str, records: list[Record]) -> Alert:
    return next(e.alert for e in play(Analyzer(), records) if e.event == "opened" and e.alert.kind == kind)


def _broken() -> list[Record]:
    heads = keys(2, 4)
    logits = [2.0] * 4 + [2.0, math.inf, 2.0, 2.0]
    return [record(0, heads, loss=2.3), record(10, heads, loss=2.1, max_logit=logits)]


def _misread() -> list[Record]:
    return [record(0, keys(1, 4), share=0.5, floor_row=1.9, loss=2.3)]
