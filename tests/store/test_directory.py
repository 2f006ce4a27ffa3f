from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from entropy_monitor.errors import RunDirectoryError
from entropy_monitor.store import check_run_dir, documents, next_session
from entropy_monitor.store.directory import claim_session
from entropy_monitor.store.layout import file_path
from tests.store.samples import MODEL, contents, info, write_run


def refused(run_dir: Path, model: dict[str, Any] = MODEL) -> str:
    """The text of the refusal, which must be the same for all entrances."""
    texts = set()
    for attempt in (
        lambda: check_run_dir(run_dir, model),
        lambda: next_session(run_dir, model),
        lambda: claim_session(run_dir, info(model=model), 0),
    ):
        with pytest.raises(RunDirectoryError) as caught:
            attempt()
        texts.add(str(caught.value))
    assert len(texts) == 1
    return texts.pop()


def test_new_and_foreign_directories_take_a_new_run(tmp_path: Path) -> None:
    foreign = tmp_path / "checkpoints"
    (foreign / "tb").mkdir(parents=True)
    (foreign / "model.pt").write_bytes(b"weights")
    for run_dir in (tmp_path / "a" / "b", foreign):
        assert next_session(run_dir, MODEL) == 0
        assert claim_session(run_dir, info(), 0) == 0
        assert next_session(run_dir, MODEL) == 1
    assert (foreign / "model.pt").read_bytes() == b"weights"


def test_checking_writes_nothing(tmp_path: Path) -> None:
    check_run_dir(tmp_path / "new", MODEL)
    assert next_session(tmp_path / "new", MODEL) == 0
    assert list(tmp_path.iterdir()) == []


def test_the_same_model_continues_and_nothing_is_overwritten(tmp_path: Path) -> None:
    write_run(tmp_path, range(2))
    before = contents(tmp_path)
    # Tuples and lists, other orders and classes are still the same parameters.
    model = {"class": "Wrapped", "parameters": {"q.bias": (4,), "q.weight": (4, 4)}}
    assert claim_session(tmp_path, info(model=model, options={"every": 1}), 0) == 1
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    assert documents.read(file_path(tmp_path, "session", 1, 0))["options"] == {"every": 1}
    assert documents.read(tmp_path / "run.json")["options"] == {"every": 10}


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        (
            {"q.weight": [8, 4], "q.bias": [8]},
            "parameter 'q.weight' has shape [4, 4] in that run and has shape [8, 4] in this model (2 and 2",
        ),
        (
            {"q.weight": [4, 4], "q.bias": [4], "k.weight": [4, 4]},
            "parameter 'k.weight' does not exist in that run and has shape [4, 4] in this model (2 and 3",
        ),
        (
            {"q.weight": [4, 4]},
            "parameter 'q.bias' has shape [4] in that run and does not exist in this model (2 and 1",
        ),
    ],
)
def test_another_model_is_refused(tmp_path: Path, parameters: dict[str, list[int]], words: str) -> None:
    write_run(tmp_path, range(1))
    before = contents(tmp_path)
    text = refused(tmp_path, {"class": "Tiny", "parameters": parameters})
    assert words in text
    assert str(tmp_path) in text
    assert "Choose another run_dir" in text
    assert contents(tmp_path) == before


@pytest.mark.parametrize("damage", [b"", b'{"format": 1', b"\x00" * 40])
def test_a_corrupt_run_file_is_refused_and_kept(tmp_path: Path, damage: bytes) -> None:
    write_run(tmp_path, range(1))
    (tmp_path / "run.json").write_bytes(damage)
    before = contents(tmp_path)
    text = refused(tmp_path)
    assert "run.json is not valid JSON" in text
    assert "Nothing was overwritten" in text
    assert contents(tmp_path) == before


def test_a_changed_run_file_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, range(1))
    text = (tmp_path / "run.json").read_text().replace("q.bias", "r.bias")
    (tmp_path / "run.json").write_text(text)
    assert "was changed after it was written" in refused(tmp_path)


def test_files_of_a_run_without_its_run_file_are_damage(tmp_path: Path) -> None:
    write_run(tmp_path, range(1))
    (tmp_path / "run.json").unlink()
    before = contents(tmp_path)
    assert "alerts-000-000.jsonl of an earlier run, but no run.json" in refused(tmp_path)
    assert contents(tmp_path) == before


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    documents.create(tmp_path / "run.json", {"format": 99, "model": MODEL})
    assert "has format 99" in refused(tmp_path)


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for run_dir in (tmp_path / "file", tmp_path / "file" / "below"):
        assert f"{tmp_path / 'file'} is there and is none" in refused(run_dir)


def test_a_directory_without_rights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert f"no permission in {tmp_path}" in refused(tmp_path / "new")


def test_a_failing_disk_is_reported_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(documents, "create", fail)
    with pytest.raises(RunDirectoryError, match=f"cannot write in {tmp_path}.*No space left"):
        claim_session(tmp_path, info(), 0)


def test_ranks_of_one_launch_share_a_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert [claim_session(tmp_path, info(), rank) for rank in (1, 0)] == [0, 0]
    assert [claim_session(tmp_path, info(), rank) for rank in (0, 1)] == [1, 1]
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert [claim_session(tmp_path, info(), rank) for rank in (3, 0, 2, 1)] == [2, 2, 2, 2]


def test_threads_that_start_at_once_get_different_sessions(tmp_path: Path) -> None:
    barrier = threading.Barrier(8)
    sessions: list[int] = []

    def start() -> None:
        barrier.wait()
        sessions.append(claim_session(tmp_path, info(), 0))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(sessions) == list(range(8))


def test_processes_that_start_at_once_get_different_sessions(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.store.samples import write_run\n"
        "sys.stdin.read(1); print(write_run(Path(sys.argv[1]), (5,)).session)"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "run")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for _ in range(2)
    ]
    for process in started:
        assert process.stdin is not None
        process.stdin.write("x")
        process.stdin.flush()
    assert sorted(int(process.communicate()[0]) for process in started) == [0, 1]


def test_two_models_that_start_at_once_cannot_both_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = documents.create

    def slower(path: Path, payload: dict[str, Any]) -> None:
        if path.name == "run.json":
            other = {"format": 1, "model": {"class": "Other", "parameters": {"w": [1]}}}
            create(path, other)
        create(path, payload)

    monkeypatch.setattr(documents, "create", slower)
    with pytest.raises(RunDirectoryError, match="holds the run of another model"):
        claim_session(tmp_path, info(), 0)


def test_the_run_file_says_what_ran(tmp_path: Path) -> None:
    claim_session(tmp_path, info(), 0)
    plain = json.loads((tmp_path / "run.json").read_text())
    assert plain["model"] == MODEL
    assert plain["versions"]["torch"] == "2"
    assert plain["format"] == 1


def test_ranks_find_the_session_of_their_launch_even_if_others_went_on(tmp_path: Path) -> None:
    assert claim_session(tmp_path, info(), 0) == 0  # one process
    assert claim_session(tmp_path, info(launch="a-1"), 1) == 1
    assert claim_session(tmp_path, info(launch="a-1"), 0) == 1
    assert claim_session(tmp_path, info(launch="a-2"), 0) == 2
    assert next_session(tmp_path, MODEL, 2, "a-1") == 1
    assert claim_session(tmp_path, info(launch="a-1"), 2) == 1
    assert claim_session(tmp_path, info(launch="a-2"), 1) == 2
    assert claim_session(tmp_path, info(launch="b-1"), 3) == 3
