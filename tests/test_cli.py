"""The command line, on a run of the demonstration."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from entropy_monitor import load_run
from entropy_monitor.cli import main
from tests.conftest import Demo

pytestmark = pytest.mark.xdist_group("demo")


def test_check_passes_a_sound_run(demo: Demo, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(demo.folder / "sound")]) == 0
    assert "no alert" in capsys.readouterr().out


def test_check_fails_a_collapsed_run(demo: Demo, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(demo.folder / "too-fast")]) == 1
    out = capsys.readouterr().out
    assert "[severe] Attention entropy has collapsed in blocks.0.attn" in out


def test_check_prints_json(demo: Demo, capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", "--json", str(demo.folder / "too-fast")])
    alerts = json.loads(capsys.readouterr().out)
    assert {a["kind"] for a in alerts} >= {"entropy_collapse"}
    assert len(alerts[0]["evidence"]["map"]) == 16


def test_report_compares_runs_and_does_not_overwrite(
    demo: Demo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    runs = [str(demo.folder / name) for name in ("sound", "too-fast")]
    assert main(["report", *runs, "-o", str(page)]) == 0
    assert capsys.readouterr().out.strip() == str(page)
    text = page.read_text("utf-8")
    assert "too-fast" in text
    assert "blocks.0.attn" in text
    assert main(["report", *runs, "-o", str(page)]) == 2
    assert "exists; choose another path, or replace it" in (told := capsys.readouterr().err)
    assert "--force" in told
    assert main(["report", *runs, "-o", str(page), "--force"]) == 0


def test_export_writes_what_load_run_reads(
    demo: Demo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = demo.folder / "too-fast", tmp_path / "parquet"
    assert main(["export", str(source), "-o", str(out)]) == 0
    exported = pd.read_parquet(out / "heads.parquet")
    run = load_run(source)
    keys = ["step", "layer", "call", "head"]
    merged = exported.merge(run.heads, on=keys, suffixes=("", "_run"))
    assert len(merged) == len(run.heads) == len(exported)
    assert (merged["entropy"] == merged["entropy_run"]).all()
    assert main(["export", str(source), "-o", str(out)]) == 2
    told = capsys.readouterr().err
    assert "holds heads.parquet, layers.parquet, scalars.parquet, alerts.parquet already" in told
    assert "--force" in told
    assert main(["export", str(source), "-o", str(out), "--force"]) == 0


@pytest.mark.parametrize("command", ["report", "export"])
def test_an_output_that_cannot_be_written_is_an_error_without_a_traceback(
    command: str, demo: Demo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "page.html"
    assert main([command, str(demo.folder / "sound"), "-o", str(out)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("entropy-monitor: cannot ")
    assert str(out) in err
    assert "File exists" in err or "Not a directory" in err


def test_a_path_that_is_no_run_is_an_error_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("check", "export", "report"):
        assert main([command, str(tmp_path / "nothing")]) == 2
        err = capsys.readouterr().err
        assert err.startswith("entropy-monitor: ")
        assert str(tmp_path / "nothing") in err
        assert "Traceback" not in err


def test_a_command_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "command" in capsys.readouterr().err
