"""The site builds without warnings, and needs nothing but its own files."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.docs.pages import DOCS, PAGES, ROOT

pytestmark = pytest.mark.xdist_group("site")

_LOADED = re.compile(
    r"<(?:script|img|iframe|source|video|audio|embed)\b[^>]*?\bsrc=\"([^\"]+)\"|<link\b([^>]*)>"
)
_LINKED = re.compile(r"<a\b[^>]*?\bhref=\"([^\"]+)\"")
_IDS = re.compile(r"\bid=\"([^\"]+)\"")


def html(site: Path) -> list[Path]:
    """Every page of the site."""
    return sorted(site.rglob("*.html"))


def loaded(page: Path) -> list[str]:
    """What a browser fetches for a page without being asked."""
    found = []
    for source, link in _LOADED.findall(page.read_text("utf-8")):
        href = re.search(r"href=\"([^\"]+)\"", link)
        if source or (href and not re.search(r"rel=\"(?:prev|next|search|index|canonical)\"", link)):
            found.append(source or (href[1] if href else ""))
    return found


def test_every_page_is_there(site: Path) -> None:
    wanted = {path.relative_to(DOCS).with_suffix(".html") for path in PAGES}
    assert wanted - {path.relative_to(site) for path in html(site)} == set()


def test_nothing_comes_from_other_hosts(site: Path) -> None:
    for page in html(site):
        for source in loaded(page):
            assert not source.startswith(("http:", "https:", "//")), (page.name, source)
            path = unquote(source.partition("?")[0].partition("#")[0])
            assert (page.parent / path).is_file(), (page.name, source)
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//", style.read_text("utf-8")), style


def test_links_and_their_anchors(site: Path) -> None:
    ids = {page: set(_IDS.findall(page.read_text("utf-8"))) for page in html(site)}
    for page in ids:
        for target in _LINKED.findall(page.read_text("utf-8")):
            if target.startswith(("http:", "https:", "mailto:")):
                continue
            path, _, anchor = unquote(target).partition("#")
            place = (page.parent / path).resolve() if path else page
            assert place.exists(), (page.name, target)
            if anchor and place in ids:
                assert anchor in ids[place], (page.name, target)


def test_formulas_are_drawn(site: Path) -> None:
    text = (site / "metrics.html").read_text("utf-8")
    found = re.findall(r"<math.*?</math>", text, re.DOTALL)
    assert len(found) > 20
    for formula in found:
        ET.fromstring(re.sub(r"&(?!lt;|gt;|amp;)\w+;", lambda entity: unescape(entity[0]), formula))
        assert "\\" not in re.sub(r"<annotation.*?</annotation>", "", formula, flags=re.DOTALL), formula
    assert "$" not in re.sub(r"<(pre|code|script).*?</\1>", "", text, flags=re.DOTALL)


def test_what_make_site_runs_is_what_was_built() -> None:
    recipe = (ROOT / "Makefile").read_text("utf-8").partition("\nsite:")[2].partition("\n\n")[0]
    assert "sphinx-build" in recipe
    assert "--fail-on-warning" in recipe
    assert "docs docs/_build" in recipe
