from __future__ import annotations

import errno
import os
import time
from functools import partial
from pathlib import Path

import pytest

from entropy_monitor.errors import ConfigurationError, RunDirectoryError
from entropy_monitor.records import HEADS, Record
from entropy_monitor.store import RunWriter, read_run
from tests.store.samples import columns, contents, event, info, record, write_run


def steps_on_disk(run_dir: Path) -> list[int]:
    return sorted(set(read_run(run_dir).heads["step"].to_pylist()))


def opened(run_dir: Path, **options: float) -> RunWriter:
    writer = RunWriter(run_dir, **options)  # type: ignore[arg-type]
    writer.open(info())
    return writer


def test_records_that_come_rarely_are_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    writer = opened(tmp_path, flush_seconds=1.0)
    writer.log(record(0))
    assert steps_on_disk(tmp_path) == [0]
    now = 100.5
    writer.log(record(1))
    assert steps_on_disk(tmp_path) == [0]
    now = 101.0
    writer.log(record(2))
    assert steps_on_disk(tmp_path) == [0, 1, 2]
    writer.close()


def test_records_that_come_fast_are_written_together(tmp_path: Path) -> None:
    writer = opened(tmp_path, flush_every=3, flush_seconds=1e9)
    seen = []
    for step in range(7):
        writer.log(record(step))
        seen.append(len(steps_on_disk(tmp_path)))
    # The first is written at once: nothing was written before it.
    assert seen == [1, 1, 1, 4, 4, 4, 7]
    writer.close()


def test_flush_and_close_write_what_is_held(tmp_path: Path) -> None:
    writer = opened(tmp_path, flush_seconds=1e9)
    for step in (0, 1):
        writer.log(record(step))
    writer.flush()
    assert steps_on_disk(tmp_path) == [0, 1]
    writer.log(record(2))
    writer.close()
    writer.close()
    data = read_run(tmp_path)
    assert steps_on_disk(tmp_path) == [0, 1, 2]
    assert data.problems == []
    assert data.sessions[0].closed


def test_an_alert_is_on_disk_at_once_with_the_records_before_it(tmp_path: Path) -> None:
    writer = opened(tmp_path, flush_seconds=1e9)
    writer.log(record(0))
    writer.log(record(1))
    writer.alert(event(1))
    assert steps_on_disk(tmp_path) == [0, 1]
    assert [item.step for item in read_run(tmp_path).alerts] == [1]
    writer.close()


def test_the_plan_may_come_late_and_again(tmp_path: Path) -> None:
    writer = opened(tmp_path)
    before = contents(tmp_path)["run.json"]
    assert read_run(tmp_path).plan == {}
    for source in ("sdpa", "eager"):
        writer.describe({"layer.0": {"source": source}})
        assert read_run(tmp_path).plan == {"layer.0": {"source": source}}
    assert contents(tmp_path)["run.json"] == before
    writer.close()
    second = RunWriter(tmp_path)
    second.open(info(plan={"layer.0": {"source": "given"}}))
    second.close()
    assert read_run(tmp_path).plan == {"layer.0": {"source": "given"}}


def test_a_session_of_its_own_whatever_the_info_says(tmp_path: Path) -> None:
    assert write_run(tmp_path, range(1)).session == 0
    writer = RunWriter(tmp_path)
    writer.open(info(session=7))
    assert writer.session == 1
    writer.close()


def test_a_wrong_record_is_refused_whole(tmp_path: Path) -> None:
    writer = opened(tmp_path, flush_seconds=0)
    wrong = Record(3, columns(HEADS, 3), layers={"step": []})
    with pytest.raises(ValueError, match="table 'layers' has other columns"):
        writer.log(wrong)
    writer.log(record(4))
    writer.close()
    assert steps_on_disk(tmp_path) == [4]


def test_misuse_is_named(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    with pytest.raises(RuntimeError, match=r"is not open: call open\(info\) first"):
        writer.log(record(0))
    writer.open(info())
    with pytest.raises(RuntimeError, match="was opened before"):
        writer.open(info())
    writer.close()
    for call in (partial(writer.log, record(0)), writer.flush, partial(writer.describe, {})):
        with pytest.raises(RuntimeError, match="is closed"):
            call()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": -1}, "rank must be at least 0; it is -1"),
        ({"flush_every": 0}, "flush_every must be at least 1; it is 0"),
        ({"flush_seconds": -0.5}, "flush_seconds must be at least 0; it is -0.5"),
        ({"flush_seconds": float("nan")}, "it is nan"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, options: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        RunWriter(tmp_path, **options)  # type: ignore[arg-type]


class FullDisk:
    """`os.write` on a disk with room for some bytes more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.room = room
        self._write = os.write
        monkeypatch.setattr(os, "write", self)

    def __call__(self, descriptor: int, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self._write(descriptor, data[: self.room])
        self.room -= written
        return written


@pytest.mark.parametrize("room", [0, 100, 2500])
def test_a_full_disk_raises_once_and_leaves_whole_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    writer = opened(tmp_path, flush_seconds=0)
    writer.log(record(0))
    FullDisk(monkeypatch, room)
    with pytest.raises(OSError, match="No space left"):
        writer.log(record(1))
    writer.log(record(2))
    writer.alert(event(2))
    writer.flush()
    writer.close()
    assert writer.failure is not None
    assert writer.failure.errno == errno.ENOSPC
    data = read_run(tmp_path)
    assert data.problems == []
    assert set(data.heads["step"].to_pylist()) <= {0, 1}
    assert 0 in data.heads["step"].to_pylist()
    assert not data.sessions[0].closed


def test_a_full_disk_at_the_start_is_an_error_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FullDisk(monkeypatch, 900)  # enough for run.json and the claim
    writer = RunWriter(tmp_path)
    with pytest.raises(RunDirectoryError, match=r"No space left.*Make room there, or choose another"):
        writer.open(info())
    writer.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
def test_dev_full(tmp_path: Path) -> None:
    writer = opened(tmp_path, flush_seconds=0)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, writer._files._streams["heads"]._file._descriptor)  # type: ignore[union-attr,arg-type]
    os.close(full)
    with pytest.raises(OSError, match="No space left"):
        writer.log(record(0))
    writer.close()


def test_no_descriptor_is_left_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path("/proc/self/fd")
    if not folder.exists():
        pytest.skip("Linux only")
    before = len(list(folder.iterdir()))
    write_run(tmp_path / "a", range(2))
    writer = opened(tmp_path / "b", flush_seconds=0)
    FullDisk(monkeypatch, 10)
    with pytest.raises(OSError, match="No space left"):
        writer.log(record(1))
    assert len(list(folder.iterdir())) == before
