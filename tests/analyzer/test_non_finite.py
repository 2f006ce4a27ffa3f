from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from entropy_monitor.analyzer import Analyzer
from tests.analyzer.series import brief, keys, play, record

KIND = "non_finite"


@pytest.mark.parametrize(
    "columns",
    [{"entropy": math.nan}, {"entropy": math.inf}, {"max_logit": math.inf}],
)
def test_severe_at_once(columns: dict[str, Any]) -> None:
    analyzer = Analyzer()
    analyzer.update(record(0, keys(2, 2)))
    events = analyzer.update(record(10, keys(2, 2), **columns))
    assert brief(events) == [("opened", 10, KIND)] * 2
    alert = events[0].alert
    assert (alert.severity, alert.layer, alert.heads) == ("severe", "blocks.0.attn", (0, 1))
    assert alert.title == "Attention is not finite in blocks.0.attn (all 2 heads)"
    assert "checkpoint from before step 10" in alert.advice
    assert alert.evidence["worst_head"] == 0
    json.dumps(dict(alert.evidence), allow_nan=False)


@pytest.mark.parametrize(
    "columns",
    [
        {"max_logit": -math.inf, "entropy": math.nan},
        {"rows_read": 0, "entropy": math.nan, "max_logit": math.nan},
    ],
)
def test_nothing_read_is_no_fault(columns: dict[str, Any]) -> None:
    assert play(Analyzer(), [record(i, keys(1, 2), **columns) for i in range(5)]) == []


def test_heads_that_were_not_read_do_not_hide_those_that_were() -> None:
    analyzer = Analyzer()
    (event,) = analyzer.update(
        record(0, keys(1, 3), rows_read=[0, 512, 512], entropy=[math.nan, 2.0, math.nan])
    )
    assert event.alert.heads == (2,)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_the_loss(loss: float) -> None:
    analyzer = Analyzer()
    analyzer.update(record(0, keys(1, 2), loss=2.0))
    (event,) = analyzer.update(record(10, keys(1, 2), loss=[1.5, loss]))
    assert (event.alert.kind, event.alert.layer, event.alert.title) == (KIND, "", "The loss is not finite")
    assert event.alert.message == (
        "The loss is NaN or infinite since step 10. The last finite value was 1.5."
    )


def test_one_alert_for_a_lasting_fault_and_an_end_after_three_sound_records() -> None:
    bad = [False, True, True, False, True, False, False, False, False]
    records = [record(i, keys(1, 2), entropy=[math.nan if ill else 2.0, 2.0]) for i, ill in enumerate(bad)]
    events = play(Analyzer(), records)
    assert brief(events) == [("opened", 1, KIND), ("closed", 7, KIND)]
    assert events[0].alert.heads == (0,)


def test_no_baseline_takes_it_in() -> None:
    """A NaN, an infinity and a NaN loss in between change nothing in what the others find."""
    shares = [0.97] * 5 + [0.05] * 5
    clean = [record(i, keys(1, 4), share=share, loss=2.0) for i, share in enumerate(shares)]
    poison = [
        record(2, keys(1, 4), entropy=math.nan, max_logit=math.inf, loss=math.nan),
        record(2, keys(1, 4), entropy=-math.inf, max_logit=math.nan, loss=math.inf),
    ]
    dirty = clean[:3] + poison + clean[3:]
    found = [
        [(e.event, e.step, dict(e.alert.evidence)) for e in play(Analyzer(), records) if e.alert.kind != KIND]
        for records in (clean, dirty)
    ]
    assert found[0]
    assert found[0] == found[1]
    assert all(np.isfinite(v) for _, _, evidence in found[1] for v in evidence.values())
