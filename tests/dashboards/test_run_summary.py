from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest

from entropy_monitor.dashboards.run_summary import RunSummary
from entropy_monitor.records import HEADS, SCALARS, Alert, Record
from tests.dashboards.records_factory import bare, columns, event, head_row, record


def summary(records: Iterable[Record], alerts: Iterable[Alert] = ()) -> dict[str, Any]:
    summed = RunSummary()
    for one in records:
        summed.take(one)
    return summed.values(list(alerts))


def loss(step: int, value: float) -> Record:
    return Record(
        step, HEADS.empty(), scalars=columns(SCALARS, [{"step": step, "name": "loss", "value": value}])
    )


@pytest.mark.parametrize(
    ("records", "alerts", "verdict"),
    [
        ([], [], "unknown"),
        ([record(0)], [], "sound"),
        ([record(0)], [event(severity="info").alert], "sound"),
        ([record(0)], [event().alert], "watch"),
        ([record(0)], [event("closed", 20, severity="severe").alert], "trouble"),
        ([record(0), loss(3, math.nan)], [], "trouble"),
    ],
)
def test_the_verdict_follows_from_alerts_and_loss(
    records: list[Record], alerts: list[Alert], verdict: str
) -> None:
    assert summary(records, alerts)["verdict"] == verdict


def test_alerts_are_counted_and_the_first_is_named() -> None:
    alerts = [
        event(opened=30, title="first").alert,
        event("closed", 60, "a2", "severe", opened=40).alert,
        event(alert_id="a3", severity="severe", opened=50).alert,
    ]
    found = summary([record(0)], alerts)
    assert (found["alerts_severe"], found["alerts_warning"], found["alerts_info"]) == (2, 1, 0)
    assert (found["open_alerts"], found["first_alert_step"], found["first_alert"]) == (2, 30, "first")


def test_extremes_are_told_with_their_place() -> None:
    records = [
        bare(0, [head_row(0, 0, 0, entropy=1.0, max_entropy=2.0, max_logit=4.0)]),
        bare(10, [head_row(10, 1, 3, call=2, entropy=0.25, max_entropy=2.0, max_logit=80.0)]),
        bare(20, [head_row(20, 0, 0, entropy=1.5, max_entropy=2.0, max_logit=math.inf)]),
    ]
    found = summary(records)
    assert (found["lowest_share"], found["lowest_share_at"]) == (
        0.125,
        "blocks.1.attn, head 3, call 2, step 10",
    )
    assert (found["largest_logit"], found["largest_logit_at"]) == (
        80.0,
        "blocks.1.attn, head 3, call 2, step 10",
    )
    assert (found["end_share"], found["last_step"]) == (0.75, 20)


def test_growth_counts_from_each_heads_own_first_norm() -> None:
    sigmas = [(2.0, math.nan), (math.nan, 100.0), (6.0, 150.0), (math.nan, math.nan)]
    rows = [[head_row(s, 0, h, sigma_qk=x) for h, x in enumerate(pair)] for s, pair in enumerate(sigmas)]
    found = summary([bare(step, given) for step, given in enumerate(rows)])
    assert found["sigma_growth"] == 3.0
    assert found["sigma_growth_at"] == "blocks.0.attn, head 0, step 2"


def test_what_is_not_known_is_not_there() -> None:
    found = summary([bare(0, [head_row(0, 0, 0, entropy=math.nan, max_logit=math.nan, sigma_qk=math.nan)])])
    assert found.keys() == {
        "verdict", "alerts_severe", "alerts_warning", "alerts_info", "open_alerts", "last_step",
    }  # fmt: skip


def test_extremes_of_an_earlier_process_stand() -> None:
    earlier = {"lowest_share": 0.01, "lowest_share_at": "there", "largest_logit": 1.0, "verdict": "trouble"}
    summed = RunSummary(earlier)
    summed.take(record(0))
    found = summed.values([])
    assert (found["lowest_share"], found["lowest_share_at"], found["verdict"]) == (0.01, "there", "sound")
    assert found["largest_logit"] == 5.0
