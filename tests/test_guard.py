from __future__ import annotations

import logging
from typing import NoReturn

import pytest

from entropy_monitor.guard import Guard


def fail() -> NoReturn:
    raise ValueError("broken by hand")


def test_results_pass_through() -> None:
    guard = Guard()
    assert guard.run("adding", lambda a, b: a + b, 1, b=2) == 3
    assert guard.faults == {}


def test_a_fault_is_logged_once_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard()
    assert [guard.run("reading", fail) for _ in range(5)] == [None] * 5
    assert guard.faults == {"reading": 3}
    (line,) = caplog.records
    assert line.levelno == logging.WARNING
    assert line.getMessage() == (
        "entropy-monitor: reading failed; training goes on without it. It is switched off after 3 failures. "
        "ValueError: broken by hand"
    )
    assert line.exc_info is not None


def test_a_part_that_is_off_is_not_called() -> None:
    guard, calls = Guard(patience=2), []

    def part() -> None:
        calls.append(1)
        fail()

    for _ in range(5):
        guard.run("part", part)
    assert len(calls) == 2
    assert guard.is_off("part")
    assert not guard.is_off("another part")
    assert guard.run("another part", lambda: 7) == 7


def test_patience_of_one_says_so(caplog: pytest.LogCaptureFixture) -> None:
    Guard(patience=1).run("part", fail)
    assert "It is switched off now." in caplog.text


def test_strict_lets_errors_through() -> None:
    guard = Guard(strict=True)
    with pytest.raises(ValueError, match="broken by hand"):
        guard.run("part", fail)
    assert guard.faults == {}


def test_the_users_interrupt_is_not_swallowed() -> None:
    def interrupt() -> NoReturn:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Guard().run("part", interrupt)
