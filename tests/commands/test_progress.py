"""Bars in a terminal that is none of ours, and silence anywhere else."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from entropy_monitor.commands.progress import Progress
from tests.test_examples import ROOT

_SCRIPT = """
import sys, time
from entropy_monitor.commands.progress import Progress
if "no-tqdm" in sys.argv:
    sys.modules["tqdm"] = None
with Progress(2, quiet="quiet" in sys.argv) as progress:
    progress.at("first")
    time.sleep(1.6)
    progress.advance()
    progress.out("a line")
    progress.at("a\\x1bsecond")
    progress.advance()
    time.sleep(0.8)
"""


def in_terminal(*arguments: str) -> str:
    """What a terminal of 80 columns gets from the script."""
    pty, fcntl, termios, struct = map(pytest.importorskip, ("pty", "fcntl", "termios", "struct"))
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-c", _SCRIPT, *arguments]
    process = subprocess.Popen(command, stdout=side, stderr=side, stdin=side, cwd=ROOT)
    os.close(side)
    data = b""
    while True:
        try:
            chunk = os.read(main, 4096)
        except OSError:  # the other side has closed
            break
        if not chunk:
            break
        data += chunk
    os.close(main)
    assert process.wait() == 0, data
    return data.decode()


def test_a_bar_ticks_and_goes_away() -> None:
    shown = in_terminal().split("\r")
    assert any("first |" in part and "0 of 2, 00:01" in part for part in shown)
    assert any("a�second |" in part and "2 of 2" in part for part in shown)
    assert not any("\x1bs" in part for part in shown)
    assert shown[-1].strip() == "" or shown[-2].strip() == ""  # wiped at the end
    assert any(part.startswith("a line") for part in shown)


@pytest.mark.parametrize("argument", ["quiet", "no-tqdm"])
def test_no_bar_where_none_is_wanted_or_can_be(argument: str) -> None:
    assert in_terminal(argument) == "a line\r\n"


def test_nothing_is_shown_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1) as progress:
        progress.at("x")
        progress.out("y")
        progress.advance()
    assert capsys.readouterr() == ("y\n", "")
