from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, cast

import pytest
import torch

from entropy_monitor.alerting import Alerting
from entropy_monitor.analyzer import Analyzer
from entropy_monitor.guard import Guard
from entropy_monitor.hooks import Harvest
from entropy_monitor.records import Alert, AlertEvent, Record
from tests.training import record

Severity = Literal["info", "warning", "severe"]


def alert(severity: Severity = "warning", **evidence: Any) -> Alert:
    return Alert(
        "entropy_collapse-0001",
        "entropy_collapse",
        severity,
        "b.0",
        (1,),
        0,
        0,
        None,
        "t",
        "m",
        "a",
        evidence,
    )


def alert_event(
    step: int,
    event: Literal["opened", "updated", "closed"] = "opened",
    severity: Severity = "warning",
    **e: Any,
) -> AlertEvent:
    return AlertEvent(event, step, alert(severity, **e))


class Scripted:
    """Stands for an analyzer: gives the events it was told to give."""

    def __init__(self, *script: list[AlertEvent]) -> None:
        self.script = list(script)
        self.attached: list[tuple[str, Any]] = []
        self.open_alerts: tuple[Alert, ...] = ()
        self.suspects: frozenset[str] = frozenset()

    def update(self, record: Record) -> list[AlertEvent]:
        return self.script.pop(0)

    def attach(self, alert_id: str, **evidence: Any) -> Alert:
        self.attached.append((alert_id, evidence["map"]))
        return replace(alert(), evidence={**alert().evidence, **evidence})

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.open_alerts = (alert("severe"),)


def alerting(scripted: Scripted, told: list[Alert], guard: Guard | None = None) -> Alerting:
    return Alerting(cast("Analyzer", scripted), guard or Guard(), told.append)


def harvest(maps: torch.Tensor) -> Harvest:
    empty = torch.empty(0)
    return Harvest(0, (), empty, (), empty, {("b.0", 1): maps})


def test_an_alert_is_told_when_it_opens_and_when_it_gets_worse() -> None:
    events = [
        alert_event(0),
        alert_event(1, "updated"),
        alert_event(2, "updated", "severe"),
        alert_event(3, "updated", "severe"),
        alert_event(4, "closed", "severe"),
        alert_event(5),
    ]
    told: list[Alert] = []
    judge = alerting(Scripted(*([e] for e in events)), told)
    for event in events:
        assert judge.judge(record(event.step), None) == [event]
        judge.tell(event)
    assert [a.severity for a in told] == ["warning", "severe", "warning"]


def test_what_was_open_in_a_checkpoint_is_not_told_again() -> None:
    told: list[Alert] = []
    judge = alerting(Scripted([alert_event(7, "updated", "severe")]), told)
    judge.load_state_dict({})
    for event in judge.judge(record(7), None):
        judge.tell(event)
    assert told == []


def test_the_worst_heads_map_is_attached() -> None:
    maps = torch.tensor([[[1.0, 0.0]], [[0.123456, 0.876544]]])
    scripted = Scripted([alert_event(0, worst_head=1, call=1)])
    (event,) = alerting(scripted, []).judge(record(), harvest(maps))
    assert scripted.attached == [("entropy_collapse-0001", [[0.1235, 0.8765]])]
    assert event.alert.evidence["map"] == [[0.1235, 0.8765]]


@pytest.mark.parametrize(
    "event",
    [
        alert_event(0, call=1),
        alert_event(0, worst_head=1, call=0),
        alert_event(0, worst_head=1, call=1, map=[[1.0]]),
        alert_event(0, "closed", worst_head=1, call=1),
    ],
    ids=["no head", "another call", "has one", "closed"],
)
def test_no_map_is_attached(event: AlertEvent) -> None:
    scripted = Scripted([event])
    assert alerting(scripted, []).judge(record(), harvest(torch.ones(2, 1, 2))) == [event]
    assert scripted.attached == []


def test_a_map_that_cannot_be_kept_costs_the_map_only(caplog: pytest.LogCaptureFixture) -> None:
    event, told, guard = alert_event(0, worst_head=5, call=1), list[Alert](), Guard()
    judge = alerting(Scripted([event]), told, guard)
    assert judge.judge(record(), harvest(torch.ones(2, 1, 2))) == [event]
    assert guard.faults == {"keeping an attention map": 1}


def test_on_alert_that_raises_costs_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    def complain(alert: Alert) -> None:
        raise RuntimeError("no route to host")

    guard = Guard()
    judge = Alerting(cast("Analyzer", Scripted([alert_event(0)])), guard, complain)
    (event,) = judge.judge(record(), None)
    judge.tell(event)
    assert guard.faults == {"on_alert": 1}
    assert "on_alert failed" in caplog.text


def test_an_analyzer_that_raises_costs_its_alerts_only(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard()
    assert alerting(Scripted(), [], guard).judge(record(), None) == []
    assert guard.faults == {"analysing": 1}
