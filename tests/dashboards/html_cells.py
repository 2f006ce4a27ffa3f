"""What a browser shows of an HTML table: the text of its cells, and which elements there are."""

from __future__ import annotations

from html.parser import HTMLParser


class Cells(HTMLParser):
    """Rows of `<td>` texts, those without any left out, and the set of all tags."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self._inside = False
        self.feed(html)
        self.close()
        self.rows = [row for row in self.rows if any(row)]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")
        self._inside = tag == "td"

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.rows[-1][-1] += data


TABLE_TAGS = {"table", "thead", "tbody", "tr", "th", "td"}
