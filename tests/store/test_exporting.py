from __future__ import annotations

import json
import logging
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from entropy_monitor.errors import RunDirectoryError
from entropy_monitor.store import export, read_run
from tests.store.samples import contents, event, write_run

NAMES = {"heads.parquet", "layers.parquet", "scalars.parquet", "alerts.parquet"}


def test_parquet_holds_what_was_read(tmp_path: Path) -> None:
    write_run(tmp_path, range(3), events=(event(1), event(2, "closed", opened=1), event(2, id_="b")))
    folder = export(tmp_path)
    assert folder == tmp_path / "parquet"
    assert set(contents(folder)) == NAMES
    data = read_run(tmp_path)
    for name in ("heads", "layers", "scalars"):
        found = pq.read_table(folder / f"{name}.parquet")
        assert found.replace_schema_metadata().equals(getattr(data, name))
        assert json.loads(found.schema.metadata[b"entropy_monitor.run"])["model"]["class"] == "Tiny"
    first, second = pq.read_table(folder / "alerts.parquet").to_pylist()
    assert (first["id"], first["heads"], first["closed"]) == ("a", [0, 1], 2)
    assert (second["id"], second["closed"]) == ("b", None)
    assert json.loads(first["evidence"])["sigma"] == {"$float": "inf"}


def test_a_run_of_nothing_is_four_empty_tables(tmp_path: Path) -> None:
    write_run(tmp_path / "run", ())
    folder = export(tmp_path / "run", tmp_path / "out" / "deep")
    assert [pq.read_table(path).num_rows for path in folder.iterdir()] == [0, 0, 0, 0]


def test_nothing_is_overwritten_unless_asked(tmp_path: Path) -> None:
    write_run(tmp_path / "run", range(1))
    out = tmp_path / "out"
    out.mkdir()
    (out / "heads.parquet").write_bytes(b"mine")
    (out / "notes.txt").write_bytes(b"notes")
    before = contents(out)
    with pytest.raises(RunDirectoryError, match=r"holds heads\.parquet already.*overwrite=True"):
        export(tmp_path / "run", out)
    assert contents(out) == before
    export(tmp_path / "run", out, overwrite=True)
    assert pq.read_table(out / "heads.parquet").num_rows == 4
    assert set(contents(out)) == NAMES | {"notes.txt"}
    assert contents(out)["notes.txt"] == b"notes"


def test_a_failing_export_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "run", range(1))

    def fail(_table: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", fail)
    with pytest.raises(RunDirectoryError, match=r"cannot write .*heads\.parquet: .*No space left"):
        export(tmp_path / "run", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_damage_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_run(tmp_path, range(3))
    path = tmp_path / "heads-000-000.arrows"
    data = bytearray(path.read_bytes())
    data[-200] ^= 1
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING, logger="entropy_monitor"):
        export(tmp_path)
    assert "lacks what could not be read: heads-000-000.arrows" in caplog.text


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "run", range(1))
    (tmp_path / "file").touch()
    with pytest.raises(RunDirectoryError, match="cannot make the folder"):
        export(tmp_path / "run", tmp_path / "file" / "below")
    with pytest.raises(RunDirectoryError, match="does not exist"):
        export(tmp_path / "absent")
