from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from entropy_monitor.analyzer.detector import Finding, Words
from entropy_monitor.analyzer.lifecycle import AlertBook
from entropy_monitor.errors import ConfigurationError
from entropy_monitor.records import AlertEvent, Severity


def finding(
    heads: tuple[int, ...] = (0,),
    severity: Severity = "warning",
    score: float = 0.0,
    worst: int = 0,
    layer: str = "a",
) -> Finding:
    return Finding(layer, heads, 4, severity, since=5, score=score, worst=worst)


def tell(book: AlertBook, step: int, *findings: Finding) -> list[AlertEvent]:
    def gather(found: Finding) -> dict[str, Any]:
        return {"worst_head": found.worst, "call": 0, "entropy_share": 1 / (step + 1)}

    def describe(found: Finding, evidence: Mapping[str, Any]) -> Words:
        return Words(f"{found.heads} {found.severity}", f"at {evidence['worst_head']}", "act")

    return book.update("ill", list(findings), step, gather, describe)


def test_opens_once_and_closes_once() -> None:
    book = AlertBook()
    (opened,) = tell(book, 10, finding())
    assert (opened.event, opened.step, opened.alert.id) == ("opened", 10, "ill-0001")
    assert (opened.alert.opened, opened.alert.updated, opened.alert.closed) == (5, 10, None)
    assert book.open_alerts == (opened.alert,)
    assert tell(book, 20, finding()) == []
    (closed,) = tell(book, 30)
    assert (closed.event, closed.alert.id, closed.alert.closed) == ("closed", "ill-0001", 30)
    assert closed.alert.title == "Over: (0,) warning"
    assert closed.alert.message == "Over at step 30, after 25 steps. As last told: at 0"
    assert book.open_alerts == ()
    assert tell(book, 40) == []
    assert tell(book, 50, finding())[0].alert.id == "ill-0002"


@pytest.mark.parametrize(
    ("later", "changed"),
    [(finding(), False), (finding(score=0.9), False), (finding(score=1.0), True), (finding((1,)), True),
     (finding(severity="severe"), True), (finding(severity="info"), False), (finding(()), False)],
)  # fmt: skip
def test_updates_only_on_a_real_change(later: Finding, changed: bool) -> None:
    book = AlertBook()
    tell(book, 10, finding())
    events = tell(book, 20, later)
    assert [event.event for event in events] == ["updated"] * changed
    assert tell(book, 30, later) == []


def test_heads_only_grow_and_severity_only_rises() -> None:
    book = AlertBook()
    tell(book, 10, finding((0, 2), "severe"))
    (event,) = tell(book, 20, finding((1,), "warning", worst=1))
    assert event.alert.heads == (0, 1, 2)
    assert event.alert.severity == "severe"
    assert event.alert.title == "(0, 1, 2) severe"
    assert event.alert.opened == 5


def test_each_layer_has_its_own_alert_and_kinds_do_not_touch() -> None:
    book = AlertBook()
    events = tell(book, 10, finding(layer="a"), finding(layer="b"))
    assert [event.alert.id for event in events] == ["ill-0001", "ill-0002"]
    assert book.update("other", [], 20, lambda _: {}, lambda *_: Words("", "", "")) == []
    assert len(book.open_alerts) == 2


def test_evidence_keeps_the_share_of_the_opening() -> None:
    book = AlertBook()
    tell(book, 1, finding())
    (event,) = tell(book, 3, finding(score=2))
    assert event.alert.evidence["opened_share"] == 0.5
    assert event.alert.evidence["entropy_share"] == 0.25


def test_attached_evidence_stays_with_the_same_worst_head_to_the_end() -> None:
    book = AlertBook()
    tell(book, 1, finding())
    alert = book.attach("ill-0001", {"map": np.eye(2)})
    assert alert.evidence["map"] == [[1.0, 0.0], [0.0, 1.0]]
    assert book.open_alerts == (alert,)
    (updated,) = tell(book, 2, finding(score=1))
    (closed,) = tell(book, 3)
    assert updated.alert.evidence["map"] == closed.alert.evidence["map"] == [[1.0, 0.0], [0.0, 1.0]]


def test_attached_evidence_goes_when_another_head_is_the_worst() -> None:
    book = AlertBook()
    tell(book, 1, finding())
    book.attach("ill-0001", {"map": [[1.0]]})
    (updated,) = tell(book, 2, finding(score=1, worst=3))
    assert "map" not in updated.alert.evidence
    (again,) = tell(book, 3, finding(score=2, worst=3))
    assert "map" not in again.alert.evidence


def test_attach_to_what_is_not_open_says_what_is() -> None:
    book = AlertBook()
    with pytest.raises(ConfigurationError, match="no alert 'ill-0009' is open; open: none"):
        book.attach("ill-0009", {})
    tell(book, 1, finding())
    with pytest.raises(ConfigurationError, match="open: ill-0001"):
        book.attach("ill-0009", {})


def test_state_carries_open_alerts_and_numbers() -> None:
    book = AlertBook()
    tell(book, 1, finding((1, 2), score=3.0))
    book.attach("ill-0001", {"map": [[1.0]]})
    restored = AlertBook()
    restored.load_state_dict(json.loads(json.dumps(book.state_dict(), allow_nan=False)))
    assert restored.open_alerts == book.open_alerts
    assert tell(restored, 2, finding((1, 2), score=3.5)) == []
    assert tell(restored, 3, finding((1, 2), score=4.0)) == tell(book, 3, finding((1, 2), score=4.0))
    assert tell(restored, 4, finding(layer="b"))[0].alert.id == "ill-0002"
