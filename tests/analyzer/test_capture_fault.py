from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from entropy_monitor.analyzer import Analyzer
from tests.analyzer.series import brief, keys, play, record

KIND = "capture_fault"


@pytest.mark.parametrize("floor", ["floor_row", "floor_activation", "floor_weights"])
def test_entropy_below_a_true_floor_is_a_fault_of_the_measurement(floor: str) -> None:
    columns: dict[str, Any] = {floor: [1.0, 2.5]}
    events = play(Analyzer(), [record(i, keys(1, 2), entropy=2.0, **columns) for i in range(5)])
    assert brief(events) == [("opened", 0, KIND)]
    alert = events[0].alert
    assert (alert.severity, alert.heads) == ("warning", (1,))
    assert alert.title == "The figures for blocks.0.attn cannot be right"
    assert "lies 0.5 nats below a floor" in alert.message
    assert "by hand" in alert.advice
    assert "report" in alert.advice
    assert alert.evidence["below_floor"] == pytest.approx(0.5)
    assert alert.evidence[floor] == 2.5


def test_the_papers_curve_is_no_floor() -> None:
    assert play(Analyzer(), [record(0, keys(1, 2), entropy=1.0, floor_paper=2.7)]) == []


@pytest.mark.parametrize(
    ("entropy", "floor", "found"),
    [
        (2.0, 2.003, False),
        (2.0, 2.004, True),
        (0.0, 0.0, False),
        (math.nan, 2.0, False),
        (2.0, math.nan, False),
    ],
)
def test_rounding_and_what_is_unknown_are_no_fault(entropy: float, floor: float, found: bool) -> None:
    events = play(Analyzer(), [record(0, keys(1, 1), entropy=entropy, floor_row=floor)])
    assert any(event.alert.kind == KIND for event in events) is found


def test_float32_rounding_of_the_bound_itself_stays_far_below_the_tolerance() -> None:
    """The two-valued row that reaches the bound, computed in float32, against the bound in float64."""
    worst = 0.0
    for keys_seen in (2, 64, 4096):
        for sigma in np.linspace(0.1, 30, 100):
            delta = sigma * math.sqrt(keys_seen / (keys_seen - 1))
            z = (keys_seen - 1) * math.exp(-delta)
            bound = math.log1p(z) + delta * z / (1 + z)
            logits = np.zeros(keys_seen, dtype=np.float32)
            logits[0] = delta
            p = np.exp(logits - logits.max())
            p /= p.sum()
            entropy = float(-(p * np.log(p)).sum())
            worst = max(worst, (bound - entropy) / (1 + math.log(keys_seen)))
    assert worst < 1e-4
