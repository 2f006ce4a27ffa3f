"""The command line: what it prints, in which form, and with which exit status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from entropy_monitor import cli, load_run
from entropy_monitor.cli import main
from entropy_monitor.commands import COMMANDS, Command
from entropy_monitor.errors import ConfigurationError
from tests.commands.recorded import write_run, write_runs
from tests.dashboards.records_factory import event
from tests.test_examples import ROOT

READING = ("report", "compare", "check", "export")


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """As wide as where there is none, whatever the tests run in."""
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_runs(tmp_path_factory.mktemp("cli") / "runs")


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("entropy-monitor: ")
    return line.removeprefix("entropy-monitor: ")


def of_json(capsys: pytest.CaptureFixture[str]) -> Any:
    given = capsys.readouterr()
    assert given.err == ""
    return json.loads(given.out, parse_constant=lambda name: pytest.fail(name))


# check


def test_check_passes_runs_without_severe_alerts(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(runs / "sound"), str(runs / "watch")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "sound: no alert"
    assert lines[1] == "watch: 1 alert, 0 open"
    assert "(opened at step 20, closed at 40)" in lines[2]


def test_check_fails_when_severe_ones_are_open(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(runs)]) == 1
    out = capsys.readouterr().out
    assert "[severe] Entropy has collapsed in blocks.0.attn (opened at step 10, still open)" in out
    assert out.count("Lower the learning rate.") == 1
    assert "(ill, watch)" in out


@pytest.mark.parametrize(
    ("severity", "closed", "fail_on", "status"),
    [
        ("warning", False, "severe", 0),
        ("warning", False, "warning", 1),
        ("warning", True, "warning", 0),
        ("info", False, "info", 1),
        ("info", False, "warning", 0),
        ("severe", True, "info", 0),
    ],
)
def test_check_fails_from_the_severity_that_is_asked_for(
    tmp_path: Path, severity: Any, closed: bool, fail_on: str, status: int
) -> None:
    last = [event("closed", 40, severity=severity)] if closed else []
    run = write_run(tmp_path / "run", [event(severity=severity), *last])
    assert main(["check", str(run), "--fail-on", fail_on]) == status


def test_check_prints_json(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--json", str(runs)]) == 1
    found = of_json(capsys)
    assert found["passed"] is False
    by_name = {run["name"]: run for run in found["runs"]}
    assert {name: run["passed"] for name, run in by_name.items()} == {
        "sound": True,
        "watch": True,
        "ill": False,
    }
    (alert,) = by_name["ill"]["alerts"]
    assert (alert["opened"], alert["updated"], alert["closed"], alert["severity"]) == (10, 50, None, "severe")
    assert by_name["ill"]["run"] == str(runs / "ill")


def test_check_tells_what_could_not_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", [event()])
    (log,) = run.glob("alerts-*")
    log.write_bytes(b"x" + log.read_bytes())
    assert main(["check", str(run)]) == 1
    assert "problem: " in capsys.readouterr().out


# compare


def test_compare_sets_runs_side_by_side(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["compare", str(runs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    rows = {line.split()[0]: line.split() for line in lines[:4]}
    assert rows["run"] == ["run", "verdict", "loss", "entropy", "lowest", "σ_QK", "logit", "alerts", "since"]
    assert rows["ill"] == ["ill", "trouble", "3.75", "2.0", "%", "2.0", "%", "6.0×", "52", "1", "10"]
    assert rows["sound"] == ["sound", "sound", "3.75", "80", "%", "80", "%", "6.0×", "52", "0", "–"]
    text = " ".join(lines)
    assert "ill: In trouble since step 10: Entropy has collapsed in blocks.0.attn." in text
    assert text.index("ill: In trouble") < text.index("watch: Worth a look")
    assert "sound: " not in text


def test_compare_prints_json(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(runs / "ill"), str(runs / "sound"), "--json"]) == 0
    ill, sound = of_json(capsys)
    heads = load_run(runs / "ill").heads
    share = heads["entropy"] / heads["max_entropy"]
    assert ill["lowest_share"]["value"] == pytest.approx(share.min(), rel=1e-5)
    assert ill["lowest_share"]["step"] == 50
    assert (ill["run"], ill["name"], ill["verdict"]) == (str(runs / "ill"), "ill", "trouble")
    assert (ill["first_alert"], ill["alerts"]["severe"], ill["open_alerts"]) == (10, 1, 1)
    assert (sound["first_alert"], sound["verdict"]) == (None, "sound")
    assert "version" not in sound


def test_compare_draws_and_does_not_overwrite(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "made" / "compare.png"
    command = ["compare", str(runs), "-o", str(picture)]
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(command) == 2
    assert told(capsys) == f"{picture} exists; choose another path, or replace it with --force"
    assert main([*command, "--force"]) == 0


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("", "is a folder; name a file in it"),
        ("a.xyz", "files of this kind cannot be drawn"),
    ],
)
def test_compare_says_where_it_cannot_draw(
    name: str, text: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(runs / "sound"), "-o", str(tmp_path / name)]) == 2
    assert text in told(capsys)
    assert not list(tmp_path.iterdir())


def test_compare_of_a_run_with_nothing_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "empty", steps=0)
    assert main(["compare", str(tmp_path / "empty")]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[1].split() == ["empty", "unknown", *["–"] * 5, "0", "–"]
    assert "Nothing was measured" in out


# report and export


def test_report_holds_all_runs_and_does_not_overwrite(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    command = ["report", str(runs / "sound"), str(runs / "ill"), "-o", str(page)]
    assert main(command) == 0
    assert capsys.readouterr().out.strip() == str(page)
    text = page.read_text("utf-8")
    assert "Entropy has collapsed in blocks.0.attn" in text
    assert main(command) == 2
    assert "exists; choose another path, or replace it" in (line := told(capsys))
    assert "--force" in line
    assert main([*command, "--force", "--json"]) == 0
    assert of_json(capsys) == {
        "report": str(page),
        "bytes": page.stat().st_size,
        "runs": [str(runs / "sound"), str(runs / "ill")],
    }


def test_export_writes_what_load_run_reads(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = runs / "ill", tmp_path / "parquet"
    assert main(["export", str(source), "-o", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    exported = pd.read_parquet(out / "heads.parquet")
    run = load_run(source)
    keys = ["step", "layer", "call", "head"]
    merged = exported.merge(run.heads, on=keys, suffixes=("", "_run"))
    assert len(merged) == len(run.heads) == len(exported)
    assert (merged["entropy"] == merged["entropy_run"]).all()
    assert main(["export", str(source), "-o", str(out)]) == 2
    line = told(capsys)
    assert "parquet holds " in line
    assert "--force" in line
    assert main(["export", str(source), "-o", str(out), "--force"]) == 0


def test_export_of_several_runs_has_a_folder_each(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(runs), "-o", str(tmp_path / "out"), "--json"]) == 0
    found = of_json(capsys)
    assert [Path(entry["folder"]).name for entry in found] == ["ill", "sound", "watch"]
    for entry in found:
        assert {Path(name).name for name in entry["files"]} == {
            f"{table}.parquet" for table in ("heads", "layers", "scalars", "alerts")
        }
        assert all(Path(name).is_file() for name in entry["files"])


def test_export_tells_runs_of_one_name_apart_by_their_folders(tmp_path: Path) -> None:
    paths = [str(write_run(tmp_path / place / "run")) for place in ("a", "b")]
    assert main(["export", *paths, "-o", str(tmp_path / "out")]) == 0
    for place in ("a", "b"):
        assert (tmp_path / "out" / place / "run" / "heads.parquet").is_file()


# doctor


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"built_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(
        "import torch\n"
        "def build():\n"
        "    layer = torch.nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)\n"
        "    return layer, torch.randn(2, 4, 8)\n"
        "def ill():\n"
        "    return 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_doctor_says_what_it_found(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", f"{module}:build", "--train"]) == 0
    assert "measured are 1 attention call in 1 layer." in capsys.readouterr().out
    assert main(["doctor", f"{module}:build", "--json"]) == 0
    found = of_json(capsys)
    assert (found["is_well"], found["identical"], found["difference"]) == (True, True, None)
    assert main(["doctor", f"{module}:ill"]) == 2
    assert "returned int; it must return (model, inputs)" in told(capsys)


# serve and demo, as processes


def process(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "entropy_monitor.cli", *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    return subprocess.Popen(command, **{**pipes, **options})


@pytest.mark.skipif(os.name != "posix", reason="POSIX only: signals")
def test_serve_prints_its_address_and_ends_with_an_interrupt(runs: Path) -> None:
    with process("serve", str(runs), "--port", "0", "--json") as server:
        assert server.stdout is not None
        address = json.loads(server.stdout.readline())["address"]
        assert address.startswith("http://127.0.0.1:")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(address, timeout=30) as page:
            assert b"<html" in page.read()
        server.send_signal(signal.SIGINT)
        rest, errors = server.communicate(timeout=30)
    assert (server.returncode, rest, errors) == (0, "", "")


@pytest.mark.skipif(os.name != "posix", reason="POSIX only: signals")
def test_serve_says_where_the_page_is_in_words(runs: Path) -> None:
    with process("serve", str(runs), "--port", "0") as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line.startswith(f"{runs} at http://127.0.0.1:")
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=30)
    assert server.returncode == 0


def test_serve_says_what_it_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(tmp_path / "nothing")]) == 2
    assert "nothing does not exist; give a run directory" in told(capsys)
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", str(tmp_path), "--port", str(port)]) == 2
    assert f"cannot listen at 127.0.0.1, port {port}" in told(capsys)


def test_demo_prints_json_alone(tmp_path: Path) -> None:
    with process("demo", "-o", str(tmp_path / "demo"), "--steps", "3", "--json") as demo:
        out, errors = demo.communicate(timeout=300)
    assert demo.returncode == 0, errors
    found = json.loads(out)
    assert found["folder"] == str(tmp_path / "demo")
    assert Path(found["report"]).is_file()
    assert [run["name"] for run in found["runs"]] == ["sound", "too-fast", "cured"]
    for run in found["runs"]:
        assert list(load_run(run["run"]).loss.index) == [0, 1, 2]
        assert list(Path(run["tensorboard"]).glob("events.*"))
        assert list(Path(run["wandb"]).glob("wandb/offline-run-*"))
        assert 0 <= run["accuracy"] <= 1


# what goes wrong


@pytest.mark.parametrize("command", [c for c in READING if c != "check"])
def test_an_output_that_cannot_be_written_is_one_line(
    command: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "page.png"
    assert main([command, str(runs / "sound"), "-o", str(out)]) == 2
    line = told(capsys)
    assert line.startswith("cannot ")
    assert str(out.parent) in line
    assert "File exists" in line or "Not a directory" in line


@pytest.mark.parametrize("command", READING)
@pytest.mark.parametrize("kind", ["nothing", "folder", "file"])
def test_a_path_that_is_no_run_is_one_line(
    command: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
    elif kind == "file":
        path.touch()
    assert main([command, str(path)]) == 2
    assert str(path) in told(capsys)


def test_names_that_hold_commands_for_the_terminal_are_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "a\x1b]0;b\x07\nc"
    run = write_run(tmp_path / name, [event(title=name, message=name, advice=name)])
    for command in ("check", "compare"):
        assert main([command, str(run)]) == 0
        out = capsys.readouterr().out
        assert not set("\x1b\x07") & set(out)
        assert "a�]0;b� c" in out
    assert main(["check", str(tmp_path / (name + name))]) == 2
    assert "a�]0;b� ca�" in told(capsys)


class Failing(Command):
    """Fail as told."""

    name = "fail"

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def add_arguments(self, parser: Any) -> None:
        """Nothing."""

    def run(self, options: Any) -> int:
        raise self._error


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ConfigurationError("two\nlines"), 2, "two lines"),
        (PermissionError(13, "Permission denied", "/a/b"), 2, "Permission denied: /a/b"),
        (OSError("odd"), 2, "odd"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_fails_is_one_line_and_a_status(
    error: BaseException,
    status: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli, "COMMANDS", (Failing(error),))
    assert main(["fail"]) == status
    assert told(capsys) == text


def test_a_fault_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "COMMANDS", (Failing(ZeroDivisionError()),))
    with pytest.raises(ZeroDivisionError):
        main(["fail"])


@pytest.mark.skipif(os.name != "posix", reason="POSIX only: pipes")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_goes_is_no_error(runs: Path, unbuffered: str) -> None:
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with process("check", str(runs), env=environment) as check:
        assert check.stdout is not None
        assert check.stderr is not None
        check.stdout.close()
        assert check.stderr.read() == ""
    assert check.returncode == 141


def test_terminals_that_know_no_greek_get_question_marks(runs: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    with process("compare", str(runs), env=environment) as compare:
        out, errors = compare.communicate(timeout=120)
    assert (compare.returncode, errors) == (0, "")
    assert "?_QK" in out


# help


def test_a_command_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "command" in capsys.readouterr().err


@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_fits_the_terminal_and_lists_the_exit_statuses(
    command: Command, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit) as stop:
        main([command.name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= width
    assert "--json" in text
    statuses = text.partition("exit status:\n")[2]
    for status in {0, 2, 130, 141, *command.statuses}:
        assert f"\n  {status}" in f"\n{statuses}"


def test_every_command_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert f"    {command.name} " in text
