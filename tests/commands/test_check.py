"""`check`: what passes a run, and what does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from entropy_monitor.cli import main
from tests.commands.recorded import write_run, write_runs


@pytest.fixture
def ill(tmp_path: Path) -> Path:
    return write_runs(tmp_path) / "ill"


def test_alerts_that_cannot_be_read_do_not_pass(ill: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = ill / "alerts-000-000.jsonl"
    log.write_text(log.read_text().replace("severe", "sever_"))
    assert main(["check", str(ill)]) == 1
    assert "line 1 is damaged" in capsys.readouterr().out
    log.unlink()
    assert main(["check", "--json", str(ill)]) == 1
    told = json.loads(capsys.readouterr().out)
    assert not told["passed"]
    assert told["runs"][0]["problems"] == ["alerts-000-000.jsonl is missing"]


def test_what_is_still_being_written_is_no_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    heads = run / "heads-000-000.arrows"
    heads.write_bytes(heads.read_bytes()[:-40])
    assert main(["check", str(run)]) == 0
    assert "still being written" in capsys.readouterr().out.replace("\n    ", " ")
