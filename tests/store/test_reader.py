from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from entropy_monitor.errors import RunDirectoryError
from entropy_monitor.records import HEADS, LAYERS, Record
from entropy_monitor.store import RunReader, RunWriter, documents, read_run
from entropy_monitor.store.codec import to_batch
from tests.store.samples import columns, event, info, record, write_run


def steps(run_dir: Path) -> list[int]:
    return sorted(set(read_run(run_dir).heads["step"].to_pylist()))


def test_a_run_comes_back_exactly(tmp_path: Path) -> None:
    special = np.array([np.nan, np.inf, -np.inf, -0.0], dtype=np.float32)
    heads, layers = columns(HEADS, 7), columns(LAYERS, 7)
    for column in HEADS.columns:
        if column.dtype == "float32":
            heads[column.name] = special
    layers["grad_l2"] = special[:2]
    scalars = {"step": np.array([7, 7]), "name": ["loss", "η"], "value": np.array([np.nan, 1e300])}
    events = (event(7), event(7, "closed", opened=7))
    writer = RunWriter(tmp_path)
    writer.open(info())
    writer.log(Record(7, heads, layers, scalars))  # type: ignore[arg-type]
    for item in events:
        writer.alert(item)
    writer.close()

    data = read_run(tmp_path)
    assert data.problems == []
    assert data.info["model"] == info().model
    assert [repr(item) for item in data.alerts] == [repr(item) for item in events]
    for table, given, found in ((HEADS, heads, data.heads), (LAYERS, layers, data.layers)):
        written = pa.Table.from_batches([to_batch(table, given)])
        assert found.schema.equals(written.schema)
        for name in table.names:
            assert str(found[name].to_pylist()) == str(written[name].to_pylist())  # nan, -0.0
    assert str(data.scalars["value"].to_pylist()) == "[nan, 1e+300]"
    assert data.scalars["name"].to_pylist() == ["loss", "η"]
    assert data.heads["entropy"].null_count == 0
    assert data.heads["sigma_qk"].null_count == 1


def test_a_run_is_readable_while_it_is_written(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path, flush_seconds=0)
    writer.open(info())
    reader = RunReader(tmp_path)
    data = reader.read()
    assert (data.heads.num_rows, data.problems) == (0, [])
    for step in range(3):
        writer.log(record(step))
        data = reader.read()
        assert data.heads["step"].to_pylist()[-1] == step
        assert data.problems == []
        assert not data.sessions[0].closed
        assert data.heads.equals(read_run(tmp_path).heads)
    writer.close()
    assert reader.read().sessions[0].closed


def test_sessions_that_overlap_and_what_is_told_of_them(tmp_path: Path) -> None:
    write_run(tmp_path, (0, 10, 20, 30), events=(event(10), event(30, "closed", opened=10)), close=False)
    write_run(tmp_path, (20, 40), shift=0.5, events=(event(20, id_="b"),))
    data = read_run(tmp_path)
    assert steps(tmp_path) == [0, 10, 20, 40]
    at_20 = data.heads.filter(pa.compute.equal(data.heads["step"], 20))
    assert at_20.equals(pa.Table.from_batches([to_batch(HEADS, columns(HEADS, 20, shift=0.5))]))
    assert sorted(set(data.layers["step"].to_pylist())) == [0, 10, 20, 40]
    assert data.scalars["step"].to_pylist() == [0, 10, 20, 40]
    assert [(item.step, item.alert.id) for item in data.alerts] == [(10, "a"), (20, "b")]
    first, second = data.sessions
    assert (first.first_step, first.last_step, first.superseded_from, first.closed) == (0, 30, 20, False)
    assert (second.first_step, second.last_step, second.superseded_from, second.closed) == (
        20,
        40,
        None,
        True,
    )
    assert first.claim["options"] == {"every": 10}


def test_ranks_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, shift in ((0, 0.0), (1, 1.0)):
        writer = write_run(tmp_path, (0, 10), rank=rank, shift=shift, events=(event(10, id_=f"r{rank}"),))
        assert writer.session == 0
    data = read_run(tmp_path)
    assert data.heads.num_rows == 2 * 4
    assert set(data.heads["rows_read"].to_pylist()) == {64}
    entropy = data.heads["entropy"].to_numpy()[:4]
    np.testing.assert_allclose(entropy, np.asarray(columns(HEADS, 0)["entropy"]) + 0.5, rtol=1e-6)
    assert [item.alert.id for item in data.alerts] == ["r0"]
    assert data.sessions[0].ranks == (0, 1)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_damaged_is_named_and_the_rest_read(tmp_path: Path, seed: int) -> None:
    write_run(tmp_path, range(3), events=(event(0), event(1, "updated", opened=0)))
    writer = RunWriter(tmp_path)
    writer.open(info(plan={"layer": {"source": "sdpa"}}))
    writer.close()
    sound = read_run(tmp_path)
    generator = random.Random(seed)
    for path in sorted(tmp_path.iterdir()):
        original = path.read_bytes()
        for _ in range(10 if original else 0):
            changed = bytearray(original)
            changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
            path.write_bytes(changed)
            data = read_run(tmp_path)
            if path.name in " ".join(data.problems):
                assert data.heads.num_rows >= sound.heads.num_rows - 4
            else:
                assert data.problems == []
                assert (data.info, data.plan, data.sessions) == (sound.info, sound.plan, sound.sessions)
                assert data.heads.equals(sound.heads)
                assert data.layers.equals(sound.layers)
                assert data.scalars.equals(sound.scalars)
                assert repr(data.alerts) == repr(sound.alerts)
        for damage in (b"", generator.randbytes(200)):
            path.write_bytes(damage)
            read_run(tmp_path)
        path.write_bytes(original)
    assert read_run(tmp_path).heads.equals(sound.heads)


def test_a_corrupt_run_file_costs_the_info_only(tmp_path: Path) -> None:
    write_run(tmp_path, range(2))
    (tmp_path / "run.json").write_text("{")
    data = read_run(tmp_path)
    assert data.info == {}
    assert data.heads.num_rows == 8
    assert "run.json is not valid JSON" in data.problems[0]
    (tmp_path / "run.json").unlink()
    assert read_run(tmp_path).problems == ["run.json is missing"]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.pt").touch()
    for name, words in (
        ("file", "is a file; expected a directory with a run.json"),
        ("absent", "does not exist; expected a directory with a run.json"),
        ("folder", "holds no run; expected a directory with a run.json"),
    ):
        with pytest.raises(RunDirectoryError, match=words) as caught:
            read_run(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
    documents.create(tmp_path / "folder" / "run.json", {"format": 99})
    with pytest.raises(RunDirectoryError, match=r"has format 99; this version .* Upgrade"):
        read_run(tmp_path / "folder")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX only")
def test_what_was_written_survives_a_kill(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from entropy_monitor.store import RunWriter
from tests.store.samples import event, info, record
writer = RunWriter(Path(sys.argv[1]), flush_seconds=0)
writer.open(info())
for step in range(10**6):
    writer.log(record(step))
    if step == 20:
        writer.alert(event(step))
    print(step, flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 40:
            break
    process.kill()
    acknowledged = [
        40,
        *(int(line) for line in process.stdout.read().splitlines(keepends=True) if line[-1] == "\n"),
    ]
    process.wait()

    data = read_run(tmp_path / "run")
    assert set(range(acknowledged[-1] + 1)) <= set(data.heads["step"].to_pylist())
    assert [item.step for item in data.alerts] == [20]
    assert all("cut short" in problem for problem in data.problems)
    assert not data.sessions[0].closed
    # And the run simply goes on.
    assert write_run(tmp_path / "run", (41,)).session == 1
    assert steps(tmp_path / "run") == list(range(42))
