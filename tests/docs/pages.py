"""Pages as the tests see them: headings, links, code, tables."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import unquote

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
ALL = [*PAGES, ROOT / "README.md"]

_parser = MarkdownIt("commonmark").enable("table")
_MARK = re.compile(r"<!-- (anew|setup|not run)(?:: (.+?))? -->")


def name_of(path: Path) -> str:
    """How a test names a page."""
    return path.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Code:
    """A fenced block.

    Attributes:
        page: where it stands.
        line: of its fence, from 1.
        language: as the fence says.
        text: what is in it.
        mark: `anew`, `setup` or `not run`, where a comment before it says so to the tests; or empty.
        of: what comes after the mark's colon.
    """

    page: Path
    line: int
    language: str
    text: str
    mark: str = ""
    of: str = ""


@cache
def tokens(page: Path) -> tuple[Token, ...]:
    """A page, parsed."""
    return tuple(_parser.parse(page.read_text("utf-8")))


def code(page: Path, *languages: str) -> list[Code]:
    """The blocks of a page that are in one of some languages."""
    found, mark = [], None
    for token in tokens(page):
        if token.type == "html_block":
            mark = _MARK.search(token.content)
            continue
        if token.type == "fence" and token.info.strip() in languages:
            assert token.map is not None
            kind, of = (mark[1], mark[2] or "") if mark else ("", "")
            found.append(Code(page, token.map[0] + 1, token.info.strip(), token.content, kind, of))
        mark = None
    return found


def inline(page: Path) -> Iterator[tuple[int, Token]]:
    """Every piece of inline markup, with its line from 1."""
    for token in tokens(page):
        for child in token.children or ():
            yield (token.map or [0])[0] + 1, child


def links(page: Path) -> list[tuple[int, str]]:
    """Where links and pictures of a page lead, with their lines."""
    found = []
    for line, token in inline(page):
        target = token.attrGet("href") if token.type == "link_open" else token.attrGet("src")
        if token.type in ("link_open", "image") and target:
            found.append((line, unquote(str(target))))
    return found


def headings(page: Path) -> list[str]:
    """The text of each heading, without its markup."""
    parsed = tokens(page)
    pairs = itertools.pairwise(parsed)
    return [plain(after) for token, after in pairs if token.type == "heading_open"]


def plain(token: Token) -> str:
    """The text of inline markup."""
    return "".join(child.content for child in token.children or ())


def anchors(page: Path) -> set[str]:
    """What can stand behind `page.md#`, as code hosts and the site make it of headings."""
    found: set[str] = set()
    for heading in headings(page):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        unique, n = slug, 0
        while unique in found:
            n += 1
            unique = f"{slug}-{n}"
        found.add(unique)
    return found


def tables(page: Path, heading: str) -> list[list[list[str]]]:
    """The tables below a heading, up to the next one: rows of cells, in Markdown, without the first row."""
    found: list[list[list[str]]] = []
    inside = in_body = False
    parsed = tokens(page)
    for i, token in enumerate(parsed):
        if token.type == "heading_open":
            inside = plain(parsed[i + 1]) == heading
        elif not inside:
            continue
        elif token.type == "table_open":
            found.append([])
        elif token.type in ("tbody_open", "tbody_close"):
            in_body = token.type == "tbody_open"
        elif token.type == "tr_open" and in_body:
            found[-1].append([])
        elif token.type == "inline" and in_body and found:
            found[-1][-1].append(token.content)
    assert found, f"{name_of(page)} has no table below {heading!r}"
    return found


def words(text: str) -> str:
    """A text with single spaces, without the marks of quotes."""
    return " ".join(re.sub(r"(?m)^> ?", "", text).split())
