"""Links within the project lead to what is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.pages import ALL, DOCS, ROOT, anchors, links, name_of


def wrong(page: Path) -> list[str]:
    """The links of a page that lead nowhere."""
    found = []
    for line, target in links(page):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        if not place.exists():
            found.append(f"{name_of(page)}:{line}: {target}: no such file")
        elif not place.is_relative_to(ROOT):
            found.append(f"{name_of(page)}:{line}: {target}: outside of the project")
        elif anchor and anchor not in anchors(place):
            found.append(f"{name_of(page)}:{line}: {target}: no such heading")
    return found


@pytest.mark.parametrize("page", ALL, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    assert wrong(page) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.docs.test_links.ROOT", tmp_path)
    monkeypatch.setattr("tests.docs.pages.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "# One `two`, three\n\n[a](#one-two-three) [b](#four) [c](gone.md) ![d](gone.png)\n", "utf-8"
    )
    assert [text.split(": ")[1] for text in wrong(page)] == ["#four", "gone.md", "gone.png"]


def test_other_hosts_are_linked_safely() -> None:
    insecure = [f"{name_of(p)}: {t}" for p in ALL for _, t in links(p) if t.startswith("http://")]
    assert [t for t in insecure if "localhost" not in t and "127.0.0.1" not in t] == []


def test_every_page_can_be_reached() -> None:
    """By links alone, from the first page; the site's menu is not on a code host."""
    seen, todo = set[Path](), [DOCS / "index.md"]
    while todo:
        page = todo.pop()
        if page in seen:
            continue
        seen.add(page)
        targets = ((page.parent / target.partition("#")[0]).resolve() for _, target in links(page))
        todo += [t for t in targets if t.suffix == ".md" and t.is_relative_to(DOCS)]
    assert {name_of(p) for p in ALL if p.is_relative_to(DOCS)} - {name_of(p) for p in seen} == set()
