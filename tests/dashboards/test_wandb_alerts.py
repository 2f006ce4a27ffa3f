from __future__ import annotations

import math

import pytest

from entropy_monitor.dashboards.wandb_alerts import MOST_TITLES, AlertMail, message
from entropy_monitor.errors import ConfigurationError
from entropy_monitor.records import Alert
from tests.dashboards.records_factory import event


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def alert(number: int) -> Alert:
    return event(alert_id=str(number), opened=number, title=f"alert {number}").alert


def test_the_first_goes_at_once_and_the_next_after_the_wait() -> None:
    clock = Clock()
    mail = AlertMail(60, clock)
    assert mail.due() is None
    mail.add(alert(1))
    first = mail.due()
    assert first is not None
    assert first.title == "[warning] alert 1"
    for number in (2, 3):
        mail.add(alert(number))
    clock.now = 59.9
    assert mail.due() is None
    clock.now = 60.0
    second = mail.due()
    assert second is not None
    assert second.title == "[warning] 2 alerts: alert 2"
    clock.now = 1000.0
    assert mail.due() is None


def test_what_waits_goes_out_at_the_end() -> None:
    mail = AlertMail(60, Clock())
    mail.add(event().alert)
    assert mail.due() is not None
    mail.add(event(alert_id="a2").alert)
    assert mail.due() is None
    assert mail.rest() is not None
    assert mail.rest() is None


def test_one_that_got_worse_while_it_waited_is_told_once() -> None:
    mail = AlertMail(0)
    mail.add(event().alert)
    mail.add(event(severity="severe").alert)
    sent = mail.due()
    assert sent is not None
    assert (sent.title, sent.level) == ("[severe] Entropy collapse in blocks.0.attn", "ERROR")


def test_a_message_names_the_worst_and_lists_the_others() -> None:
    alerts = [alert(number) for number in range(100)]
    worst = event(alert_id="w", opened=500, severity="severe", title="the worst", message="This.").alert
    told = message([*alerts, worst])
    lines = told.text.splitlines()
    assert told.title == "[severe] 101 alerts: the worst"
    assert told.level == "ERROR"
    assert lines[0] == "[severe] the worst (since step 500)"
    assert lines[1] == "[warning] alert 0 (since step 0)"
    assert lines[MOST_TITLES] == f"and {101 - MOST_TITLES} more"
    assert told.text.endswith("The worst of them:\nThis.\n\nWhat to do: Lower the learning rate.")


def test_titles_fit_and_keep_both_ends() -> None:
    title = message(
        [event(title="Entropy collapse in " + "encoder.layers." * 9 + "11.self_attn").alert]
    ).title
    assert len(title) == 63
    assert title.startswith("[warning] Entropy collapse in")
    assert title.endswith(".11.self_attn")
    assert message([event(title="two\nlines").alert]).title == "[warning] two lines"


@pytest.mark.parametrize("wait", [-1, math.nan, math.inf, "60", None, True])
def test_refuses_a_wait_that_is_none(wait: object) -> None:
    with pytest.raises(ConfigurationError, match=r"alert_wait is .*; give a number of seconds"):
        AlertMail(wait)  # type: ignore[arg-type]
