from __future__ import annotations

from pathlib import Path

from entropy_monitor.store.layout import file_path, run_files


def test_names_are_read_back_in_order_and_others_passed_over(tmp_path: Path) -> None:
    expected = [
        (0, 0, "heads"),
        (0, 0, "plan"),
        (0, 0, "session"),
        (0, 12, "alerts"),
        (3, 1, "layers"),
        (1000, 0, "scalars"),
    ]
    for session, rank, kind in reversed(expected):
        file_path(tmp_path, kind, session, rank).touch()
    for name in (
        "model.pt",
        "heads-1.arrows",
        "heads-0-0.json",
        "plans-0-0.json",
        ".plan-000-000.json.x.tmp",
    ):
        (tmp_path / name).touch()
    (tmp_path / "tb").mkdir()
    assert [(f.session, f.rank, f.kind) for f in run_files(tmp_path)] == expected


def test_files_have_readable_names() -> None:
    assert file_path(Path("r"), "heads", 0, 0) == Path("r/heads-000-000.arrows")
    assert file_path(Path("r"), "alerts", 12, 3) == Path("r/alerts-012-003.jsonl")
