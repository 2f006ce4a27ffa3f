"""The runs below a folder: found, read once, read again when they grow."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from entropy_monitor.dashboards.run_view import RunView
from entropy_monitor.dashboards.web import library as library_module
from entropy_monitor.dashboards.web.library import Library, UnknownRunError
from entropy_monitor.errors import RunDirectoryError
from entropy_monitor.store import documents, find_runs, finding
from tests.dashboards.web.written_runs import begin, step, write_run


def ids(library: Library) -> list[str]:
    return [card["id"] for card in library.cards()]


def test_runs_are_found_at_and_below_the_folder(tmp_path: Path) -> None:
    for place in ("b", "sweep/lr=0.1", "sweep/lr=0.2", "sweep"):
        write_run(tmp_path / place, [0])
    (tmp_path / "no run").mkdir()
    assert ids(Library(tmp_path)) == ["b", "sweep", "sweep/lr=0.1", "sweep/lr=0.2"]
    assert ids(Library(tmp_path / "b")) == ["."]
    assert ids(Library(tmp_path / "missing")) == []


def test_a_run_that_appears_is_found_and_one_that_goes_is_left_out(tmp_path: Path) -> None:
    library = Library(tmp_path, refresh=0)
    assert ids(library) == []
    run = write_run(tmp_path / "a")
    assert ids(library) == ["a"]
    run.rename(tmp_path / "b")
    assert ids(library) == ["b"]
    with pytest.raises(UnknownRunError):
        library.ask("a", RunView.card)


def test_links_and_hidden_folders_are_not_followed(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    write_run(outside / "secret")
    write_run(folder / ".trash" / "old")
    write_run(folder / "a")
    (folder / "link").symlink_to(outside)
    (folder / "fake").mkdir()
    (folder / "fake" / "run.json").symlink_to(outside / "secret" / "run.json")
    assert ids(Library(folder)) == ["a"]


@pytest.mark.parametrize("name", ["../outside/secret", "/etc", "a/../a", "a/", "", "..", "a\0", "./a"])
def test_an_id_is_looked_up_and_never_opened(tmp_path: Path, name: str) -> None:
    write_run(tmp_path / "outside" / "secret")
    write_run(tmp_path / "folder" / "a")
    with pytest.raises(UnknownRunError):
        Library(tmp_path / "folder").ask(name, RunView.card)


def test_a_search_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(6):
        write_run(tmp_path / f"{i}", [0])
    deep = tmp_path.joinpath(*"abcdefgh")
    write_run(deep, [0])
    assert deep not in set(find_runs(tmp_path))
    monkeypatch.setattr(finding, "_MOST_RUNS", 4)
    assert len(list(find_runs(tmp_path))) == 4
    monkeypatch.setattr(finding, "_MOST_FOLDERS", 3)
    assert len(list(find_runs(tmp_path))) == 2  # the root, and two below it


def test_a_run_that_grows_is_read_again(tmp_path: Path) -> None:
    writer = begin(tmp_path / "a")
    library = Library(tmp_path, refresh=0)
    (empty,) = library.cards()
    assert (empty["verdict"], empty["measured"], empty["last_step"]) == ("unknown", 0, None)
    writer.log(step(0))
    (one,) = library.cards()
    assert (one["measured"], one["is_live"]) == (1, True)
    assert one["version"] != empty["version"]
    assert library.cards()[0]["version"] == one["version"]
    writer.log(step(10))
    assert library.ask("a", lambda view: view.overview()["positions"].tolist()) == [0.0, 10.0]
    writer.close()
    (last,) = library.cards()
    assert (last["measured"], last["is_live"]) == (2, False)


def test_what_was_just_read_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "a")
    reads: list[Path] = []
    refresh = RunView.refresh
    monkeypatch.setattr(RunView, "refresh", lambda view: (reads.append(view.path), refresh(view))[1])
    library = Library(tmp_path, refresh=1e6)
    for _ in range(3):
        library.cards()
        library.ask("a", RunView.overview)
    assert len(reads) == 1


def test_a_run_that_is_over_costs_a_look_at_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "a")
    library = Library(tmp_path, refresh=0)
    (card,) = library.cards()
    monkeypatch.setattr(RunView, "refresh", lambda view: pytest.fail("it was read again"))
    assert library.cards() == [card]


@pytest.mark.parametrize(("limit", "most"), [("_MOST_OPEN", 2), ("_MOST_ROWS", 2 * 6)])
def test_tables_of_few_runs_stay_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, most: int
) -> None:
    for name in "abcde":
        write_run(tmp_path / name, [0])
    monkeypatch.setattr(library_module, limit, most)
    library = Library(tmp_path, refresh=0)
    library.cards()
    before = {card["id"]: card["version"] for card in library.cards()}
    assert sum(shelf.view is not None for shelf in library._shelves.values()) == 2
    assert library.ask("a", lambda view: view.overview()["measured"]) == 1
    assert library.ask("e", lambda view: view.overview()["measured"]) == 1
    assert {card["id"]: card["version"] for card in library.cards()} == before


def test_runs_that_take_long_are_left_for_the_next_call(tmp_path: Path) -> None:
    for name in "abc":
        write_run(tmp_path / name, [0])
    library = Library(tmp_path, refresh=1e6)
    first = library.cards(patience=0)
    assert [card.get("pending", False) for card in first] == [False, True, True]
    assert all("version" in card and card["verdict"] == "unknown" for card in first[1:])
    library.cards(patience=0)
    assert not any(card.get("pending") for card in library.cards(patience=0))


def test_a_run_that_cannot_be_read_says_why_and_leaves_the_others_alone(tmp_path: Path) -> None:
    write_run(tmp_path / "good")
    broken = write_run(tmp_path / "broken")
    documents.replace(broken / "run.json", {"format": 99})
    library = Library(tmp_path, refresh=0)
    card, good = library.cards()
    assert card["verdict"] == "unknown"
    assert "99" in card["problem"]
    assert good["problem"] is None
    with pytest.raises(RunDirectoryError, match="99"):
        library.ask("broken", RunView.overview)


def test_a_fault_of_ours_is_a_problem_of_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    card = RunView.card

    def fails(view: RunView) -> dict[str, object]:
        if view.name == "a":
            raise ZeroDivisionError
        return card(view)

    monkeypatch.setattr(RunView, "card", fails)
    a, b = Library(tmp_path).cards()
    assert "ZeroDivisionError" in a["problem"]
    assert b["problem"] is None
    assert str(tmp_path / "a") in caplog.text


@pytest.mark.skipif(os.name != "posix", reason="POSIX only: names of any bytes")
def test_names_of_any_bytes_can_be_asked_for(tmp_path: Path) -> None:
    write_run(tmp_path / "plain", [0])
    for name in (b"caf\xe9", "σ ☃".encode(), b"a%2Fb&c=d#e"):
        (tmp_path / "plain").rename(tmp_path / os.fsdecode(name))
        library = Library(tmp_path)
        (card,) = library.cards()
        card["id"].encode("utf-8")
        assert library.ask(card["id"], lambda view: view.overview()["measured"]) == 1
        (tmp_path / os.fsdecode(name)).rename(tmp_path / "plain")


def test_many_threads_may_ask_at_once(tmp_path: Path) -> None:
    writer = begin(tmp_path / "live")
    write_run(tmp_path / "over")
    library = Library(tmp_path, refresh=0)

    def asks(i: int) -> int:
        if i % 3 == 0:
            return len(library.cards())
        return int(library.ask(("live", "over")[i % 2], lambda view: view.overview()["measured"]))

    with ThreadPoolExecutor(8) as threads:
        answers = [threads.submit(asks, i) for i in range(60)]
        for number in range(12):
            writer.log(step(number))
        assert all(answer.result(timeout=60) >= 0 for answer in answers)
    writer.close()
    assert library.ask("live", lambda view: view.overview()["measured"]) == 12
