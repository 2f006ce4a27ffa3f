from __future__ import annotations

import logging
import threading
import time

import pytest

from entropy_monitor.delivery import Delivery, open_sinks
from entropy_monitor.records import AlertEvent, Record, RunInfo, Sink
from tests.test_alerting import alert_event
from tests.training import ListSink, record

INFO = RunInfo(model={}, options={}, versions={})


class Hung(Sink):
    """Blocks in its first call until it is let go."""

    def __init__(self) -> None:
        self.entered, self.release = threading.Event(), threading.Event()
        self.got: list[int] = []

    def log(self, record: Record) -> None:
        self.entered.set()
        self.release.wait(30)
        self.got.append(record.step)


class Raising(Sink):
    def __init__(self) -> None:
        self.calls: list[str] = []

    def log(self, record: Record) -> None:
        self.calls.append("log")
        raise OSError("no space left")

    def alert(self, event: AlertEvent) -> None:
        self.calls.append("alert")

    def close(self) -> None:
        self.calls.append("close")


def test_order_is_kept_and_everything_arrives_before_close() -> None:
    sink = ListSink()
    delivery = Delivery([(sink, 1000)])
    sent = [item for step in range(100) for item in (record(step), alert_event(step))]
    for item in sent:
        delivery.send(item)
    delivery.close(10)
    assert sink.items == sent
    assert sink.calls[-1] == "close"
    assert delivery.dropped == {}
    assert delivery.faults == {}


def test_a_hung_sink_delays_nobody(caplog: pytest.LogCaptureFixture) -> None:
    hung, other = Hung(), ListSink()
    delivery = Delivery([(hung, 5), (other, 1000)])
    delivery.send(record(0))
    assert hung.entered.wait(10)
    for step in range(1, 21):  # returns although nothing moves
        delivery.send(record(step))
    assert delivery.dropped == {"Hung": 15}
    delivery.close(0.2)
    assert not hung.release.is_set()
    assert [r.step for r in other.records] == list(range(21))
    assert other.calls[-1] == "close"
    assert delivery.dropped == {"Hung": 20}
    messages = [r.getMessage() for r in caplog.records]
    assert messages == [
        "entropy-monitor: Hung cannot keep up: 5 records and alerts wait, more are dropped",
        "entropy-monitor: Hung did not finish within 0.2 s; 5 records and alerts did not reach it",
    ]
    hung.release.set()


def test_what_was_given_up_is_not_delivered_later() -> None:
    hung = Hung()
    delivery = Delivery([(hung, 10)])
    for step in range(3):
        delivery.send(record(step))
    assert hung.entered.wait(10)
    delivery.close(0)
    hung.release.set()
    (courier,) = delivery._couriers
    courier._thread.join(10)
    assert not courier._thread.is_alive()
    assert hung.got == [0]
    assert delivery.dropped == {"Hung": 2}


def test_a_raising_sink_is_switched_off_after_one_line(caplog: pytest.LogCaptureFixture) -> None:
    raising, other = Raising(), ListSink()
    delivery = Delivery([(raising, 100), (other, 100)])
    for step in range(5):
        delivery.send(record(step))
        delivery.send(alert_event(step))
    delivery.close(10)
    assert raising.calls == ["log", "close"]
    assert len(other.items) == 10
    assert delivery.faults == {"Raising": 1}
    (line,) = caplog.records
    assert line.levelno == logging.WARNING
    assert "Raising failed; training goes on without it. It is switched off now. OSError: no space left" in (
        line.getMessage()
    )


@pytest.mark.parametrize("method", ["alert", "flush", "close"])
def test_whatever_a_sink_raises_stays_with_it(
    method: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("entropy_monitor.delivery._IDLE_SECONDS", 0.01)
    sink, other, called = ListSink(), ListSink(), threading.Event()

    def fail(*args: object) -> None:
        called.set()
        raise RuntimeError("broken by hand")

    monkeypatch.setattr(sink, method, fail)
    delivery = Delivery([(sink, 100), (other, 100)])
    delivery.send(record(0))
    delivery.send(alert_event(0))
    if method == "flush":
        assert called.wait(10)
    delivery.close(10)
    assert called.is_set()
    assert len(other.items) == 2
    assert sum(delivery.faults.values()) == 1
    assert len(caplog.records) == 1


def test_flush_comes_once_when_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("entropy_monitor.delivery._IDLE_SECONDS", 0.02)
    sink = ListSink()
    delivery = Delivery([(sink, 10)])
    delivery.send(record(0))
    assert sink.flushed.wait(10)
    time.sleep(0.2)
    assert sink.calls == ["log", "flush"]
    delivery.send(record(1))
    delivery.close(10)
    assert sink.calls[:3] == ["log", "flush", "log"]


def test_two_sinks_of_one_class_are_counted_apart() -> None:
    first, second = Raising(), Raising()
    delivery = Delivery([(first, 10), (second, 10)])
    delivery.send(record(0))
    delivery.close(10)
    assert delivery.faults == {"Raising": 1, "Raising 2": 1}


def test_a_call_goes_to_one_sink_in_order() -> None:
    sink, other = ListSink(), ListSink()
    delivery = Delivery([(sink, 10), (other, 10)])
    delivery.send(record(0))
    delivery.call(sink, lambda: sink.calls.append("describe"))
    delivery.send(record(1))
    delivery.close(10)
    assert sink.calls == ["log", "describe", "log", "close"]
    assert other.calls == ["log", "log", "close"]


def test_a_sink_that_cannot_open_closes_those_before_it() -> None:
    class Broken(Sink):
        def open(self, info: RunInfo) -> None:
            raise ValueError("no account")

    before, after = ListSink(), ListSink()
    with pytest.raises(ValueError, match="no account"):
        open_sinks(INFO, [before, Broken(), after])
    assert before.calls == ["close"]
    assert after.info is None


def test_the_first_error_of_opening_is_told() -> None:
    class Sour(Sink):
        def close(self) -> None:
            raise RuntimeError("cannot close either")

    class Broken(Sink):
        def open(self, info: RunInfo) -> None:
            raise ValueError("no account")

    with pytest.raises(ValueError, match="no account"):
        open_sinks(INFO, [Sour(), Broken()])
