from __future__ import annotations

from pathlib import Path

from entropy_monitor.store import RunWriter
from entropy_monitor.trackers.alert_book import AlertBook, earlier_events
from tests.dashboards.records_factory import event, info, record


def test_tells_of_new_alerts_and_of_those_that_got_worse() -> None:
    book = AlertBook()
    assert book.update(event())
    assert not book.update(event("updated", 20))
    assert book.update(event("updated", 30, severity="severe"))
    assert not book.update(event("updated", 40, severity="info"))
    assert not book.update(event("closed", 50))


def test_counts_what_is_open() -> None:
    book = AlertBook()
    book.update(event())
    book.update(event(alert_id="a2"))
    assert book.open == 2
    book.update(event("closed", 20))
    assert book.open == 1
    assert [a.id for a in book.alerts] == ["a1", "a2"]


def test_an_id_that_is_used_again_later_is_another_alert() -> None:
    book = AlertBook()
    book.update(event("closed", 20))
    assert book.update(event(step=90, opened=90))
    assert [a.opened for a in book.alerts] == [10, 90]


def test_restores_what_was_found_before_the_step_of_return() -> None:
    book = AlertBook()
    book.restore([event(step=10), event(step=40, alert_id="a2", opened=40)], before=30)
    assert [a.id for a in book.alerts] == ["a1"]


def test_earlier_events_come_from_the_run_directory(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    writer.open(info(str(tmp_path)))
    writer.log(record(10))
    writer.alert(event(step=10))
    writer.close()
    assert [e.alert.id for e in earlier_events(info(str(tmp_path), session=1))] == ["a1"]
    assert earlier_events(info(str(tmp_path), session=0)) == []


def test_no_directory_has_no_earlier_events(tmp_path: Path) -> None:
    assert earlier_events(info(str(tmp_path / "gone"), session=1)) == []
    assert earlier_events(info(None, session=1)) == []
