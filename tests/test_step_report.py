from __future__ import annotations

from entropy_monitor import StepReport
from tests.test_alerting import alert_event


def test_alerts_are_those_that_opened() -> None:
    opened, updated, closed = alert_event(3), alert_event(3, "updated", "severe"), alert_event(3, "closed")
    report = StepReport(3, True, (opened, updated, closed))
    assert report.alerts == (opened.alert,)
    assert StepReport(4, False).alerts == ()
