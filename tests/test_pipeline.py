from __future__ import annotations

from typing import cast

import pytest
import torch

from entropy_monitor.alerting import Alerting
from entropy_monitor.analyzer import Analyzer
from entropy_monitor.delivery import Delivery
from entropy_monitor.guard import Guard
from entropy_monitor.pipeline import Pipeline
from entropy_monitor.records import AlertEvent, Record
from tests.test_alerting import Scripted, alert_event
from tests.test_transfer import UPDATES, FakeEvent, harvest
from tests.training import ListSink


class Rig:
    """A pipeline from an analyzer with a script to a sink that keeps."""

    def __init__(self, *script: list[object]) -> None:
        self.sink, self.guard = ListSink(), Guard()
        analyzer = cast("Analyzer", Scripted(*script))
        self.pipeline = Pipeline(
            Alerting(analyzer, self.guard, None), Delivery([(self.sink, 100)]), self.guard
        )


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[FakeEvent]:
    made: list[FakeEvent] = []

    def to_host(flat: torch.Tensor) -> tuple[torch.Tensor, FakeEvent]:
        made.append(FakeEvent())
        return flat.clone(), made[-1]

    monkeypatch.setattr("entropy_monitor.transfer._to_host", to_host)
    return made


def test_events_come_when_their_figures_have_arrived(copies: list[FakeEvent]) -> None:
    event = alert_event(0)
    rig = Rig([event], [])
    rig.pipeline.keep(0, 0.5, None)
    rig.pipeline.send(0, harvest(0), UPDATES)
    rig.pipeline.receive()
    assert rig.pipeline.take_events() == ()
    copies[0].done = True
    rig.pipeline.receive()
    assert rig.pipeline.take_events() == (event,)
    assert rig.pipeline.take_events() == ()
    assert copies[0].waits == 0
    rig.pipeline.close(10)
    assert rig.sink.events == [event]
    assert rig.sink.scalars() == [(0, "loss", 0.5)]


def test_a_record_is_delivered_where_judging_it_is_interrupted(
    copies: list[FakeEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Scripted, record: Record) -> list[AlertEvent]:
        raise KeyboardInterrupt

    monkeypatch.setattr(Scripted, "update", interrupted)
    rig = Rig()
    rig.pipeline.send(0, harvest(0), UPDATES)
    copies[0].done = True
    with pytest.raises(KeyboardInterrupt):
        rig.pipeline.receive()
    rig.pipeline.close(10)
    assert [r.step for r in rig.sink.records] == [0]


def test_closing_waits_for_what_is_under_way(copies: list[FakeEvent]) -> None:
    rig = Rig([], [])
    rig.pipeline.send(0, harvest(0), UPDATES)
    rig.pipeline.keep(1, 0.25, {"lr": 0.1})
    rig.pipeline.close(10)
    assert [copy.waits for copy in copies] == [1, 1]
    assert [r.step for r in rig.sink.records] == [0, 1]
    assert rig.sink.scalars() == [(1, "loss", 0.25), (1, "lr", 0.1)]
    assert rig.sink.calls[-1] == "close"


def test_state_holds_the_scalars_that_no_record_took() -> None:
    rig, again = Rig([], []), Rig([], [])
    rig.pipeline.send(0, harvest(0), UPDATES)
    rig.pipeline.keep(1, 0.25, None)
    state = rig.pipeline.state_dict()
    assert state == {"scalars": [[1, "loss", "0.25"]], "analyzer": {}}
    again.pipeline.load_state_dict(state)
    again.pipeline.send(2, harvest(2), UPDATES)
    again.pipeline.close(10)
    assert again.sink.scalars() == [(1, "loss", 0.25)]
    rig.pipeline.close(10)


def test_a_state_without_its_parts_loads() -> None:
    rig = Rig([])
    rig.pipeline.load_state_dict({"scalars": None, "analyzer": None})
    rig.pipeline.close(10)
    assert rig.sink.records == []
    assert rig.guard.faults == {}
