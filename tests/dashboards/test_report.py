"""The report: one file that stands alone, its summary in words, its data as the page reads them."""

from __future__ import annotations

import base64
import gzip
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entropy_monitor.dashboards.packing import unpack
from entropy_monitor.dashboards.report import cell, write_report
from entropy_monitor.dashboards.run_view import RunView
from entropy_monitor.errors import ConfigurationError, RunDirectoryError
from entropy_monitor.run import load_run
from tests.dashboards.web.written_runs import MAP, alert, begin, write_run

EVIL = '<script>alert("x")</script><img src=http://evil.example/x onerror=alert(1)>'
STEPS = range(0, 60, 10)


class Page(HTMLParser):
    """What a browser would make of the file before any script runs."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text("utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.kept: dict[str, str] = {}
        self.open: list[tuple[str, str | None]] = []
        self.feed(self.source)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in {"meta", "img", "br"}:
            self.open.append((tag, dict(attrs).get("id")))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tag, name = self.open[-1] if self.open else ("", None)
        if tag == "script":
            self.kept[name or "code"] = self.kept.get(name or "code", "") + data
        elif tag != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]

    def data(self) -> Any:
        return unpack(gzip.decompress(base64.b64decode(self.kept["data"])))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [write_run(folder / "calm"), write_run(folder / "bad", alerts=[alert(30)])]


@pytest.fixture(scope="module")
def page(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(write_report(runs, tmp_path_factory.mktemp("report") / "new" / "report.html"))


def test_the_summary_comes_first_and_in_words(page: Page) -> None:
    order = [
        "1 of 2 runs is sound. In trouble: bad.",
        "In trouble since step 30:",
        "Sound: no warning and no severe alert in 6 measured steps.",
        "What was seen in bad (as of step 30): ",
        "What happened, in order",
        "What to change",
        "The charts are being unpacked.",
    ]
    places = [page.text.index(text) for text in order]
    assert places == sorted(places)


def test_it_stands_alone(page: Page) -> None:
    assert not page.all("link")
    assert not page.all("img")
    assert not any("src" in attrs for attrs in page.all("script"))
    policy = next(m for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert str(policy["content"]).startswith("default-src 'none'; script-src 'unsafe-inline' blob:;")
    style = page.source[page.source.index("<style>") : page.source.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert not [line for line in page.kept["code"].splitlines() if line.startswith(("import ", "export "))]
    script = gzip.decompress(base64.b64decode(page.kept["plotly"]))
    assert b"plotly.js" in script[:200]


def test_it_carries_what_the_page_asks(page: Page, runs: list[Path]) -> None:
    data, view = page.data(), RunView(runs[1])
    assert [run["name"] for run in data["runs"]] == ["calm", "bad"]
    detail = data["details"]["bad"]
    overview = view.overview()
    assert detail["overview"]["words"] == overview["words"]
    assert [a["key"] for a in detail["overview"]["alerts"]] == [a["key"] for a in overview["alerts"]]
    np.testing.assert_allclose(detail["maps"][overview["alerts"][0]["key"]]["map"], MAP)
    assert list(detail["overview"]["positions"]) == list(STEPS)
    of_heads, of_layers = ({c["name"] for c in overview[kind]} for kind in ("columns", "layer_columns"))
    assert set(detail["heads"]) == of_heads
    assert set(detail["layers"]) == {name.removeprefix("layer.") for name in of_layers}
    assert set(detail["chosen"]) == of_heads | of_layers
    for name, kept in detail["heads"].items():
        assert kept["high"] is None  # every step is there
        for position in range(len(STEPS)):
            asked = view.grid(name, position)["values"]
            known = ~np.isnan(kept["low"][position])
            scale = np.nanmax(np.abs(kept["low"])) - np.nanmin(np.abs(kept["low"]))
            np.testing.assert_allclose(kept["low"][position][known], asked[known], atol=scale / 30_000 + 1e-6)
    curve = view.curves("entropy")["layers"][1]
    np.testing.assert_allclose(detail["heads"]["entropy"]["mean"][:, 1], curve["mean"], atol=1e-3)


def test_whatever_a_run_says_is_shown_as_text(tmp_path: Path) -> None:
    evidence = {EVIL: EVIL, "worst_head": 0}
    poisoned = alert(10, layer=EVIL, title=EVIL, message=EVIL, advice=EVIL, evidence=evidence)
    folder = tmp_path / EVIL.replace("/", "\N{FRACTION SLASH}")
    write_run(folder, alerts=[poisoned], layers=[EVIL])
    page = Page(write_report([folder, write_run(tmp_path / "other")], tmp_path / "report.html"))
    assert len(page.all("script")) == 3
    assert not any("onerror" in attrs for _, attrs in page.elements)
    assert page.text.count(EVIL) >= 2
    assert EVIL not in page.kept["code"]
    assert "</script" not in page.kept["code"].lower()


def test_any_run_has_a_report(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    begin(begun).close()
    one = write_run(tmp_path / "one", steps=[0])
    whole = write_run(tmp_path / "whole", alerts=[alert(10, layer="", heads=(), evidence={})])
    evidence = {"worst_head": 9, "map": [[1], []]}
    gone = write_run(tmp_path / "gone", alerts=[alert(10, layer="gone", evidence=evidence)])
    for run in (begun, one, whole, gone):
        page = Page(write_report(run, tmp_path / "report.html"))
        assert run.name in str(page.data()["runs"][0]["name"])
    assert "Nothing was measured" in Page(write_report(begun, tmp_path / "report.html")).text


def test_code_in_advice_is_set_as_code(tmp_path: Path) -> None:
    given = alert(10, advice="Call `em.fold(model)` <b>now</b>, or `wait`.")
    page = Page(write_report(write_run(tmp_path / "run", alerts=[given]), tmp_path / "report.html"))
    assert "Call <code>em.fold(model)</code> &lt;b&gt;now&lt;/b&gt;, or <code>wait</code>." in page.source


def test_damage_is_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "run.json").write_text("{")
    page = Page(write_report(run, tmp_path / "report.html"))
    assert "Noted while reading run." in page.text
    assert "run.json is not valid JSON" in page.text


def test_runs_are_paths_or_what_load_run_returns(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    target = tmp_path / "report.html"
    given = (run, str(run), [run], load_run(run), [load_run(run)])
    texts = {Page(write_report(each, target)).text for each in given}
    assert len(texts) == 1
    with pytest.raises(ConfigurationError, match="a run is a run directory or what load_run returns, not 3"):
        write_report([3], target)
    with pytest.raises(RunDirectoryError, match="nowhere does not exist"):
        write_report(tmp_path / "nowhere", target)


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    places = [write_run(tmp_path / side / "a") for side in ("left", "right")]
    page = Page(write_report(places, tmp_path / "report.html"))
    assert all(str(place) in page.text for place in places)
    assert [run["id"] for run in page.data()["runs"]] == [str(place) for place in places]


def test_many_alerts_are_cut_and_counted(tmp_path: Path) -> None:
    alerts = [
        alert(step, alert_id=f"a-{step}-{i}", title=f"small {step} {i}", severity="info")
        for step in STEPS
        for i in range(8)
    ]
    alerts.append(alert(50, title="grave"))
    page = Page(write_report(write_run(tmp_path / "run", alerts=alerts), tmp_path / "report.html"))
    assert "And 29 less severe or later ones, in the lists of alerts below." in page.text
    assert "grave" in page.text[page.text.index("What happened") :]
    assert len(page.data()["details"]["run"]["overview"]["alerts"]) == 49


def test_long_runs_are_shown_by_their_extremes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=range(0, 1200, 2), layers=["a"], heads=2)
    page = Page(write_report(run, tmp_path / "report.html"))
    kept, heads = page.data()["details"]["run"]["heads"]["entropy"], load_run(run).heads
    assert "600 measured steps are shown as 500 stretches" in page.text
    assert kept["low"].shape == kept["high"].shape == (500, 2)
    of_head = heads[heads["head"] == 1]["entropy"]
    assert kept["low"][:, 1].min() == pytest.approx(of_head.min(), abs=1e-3)
    assert kept["high"][:, 1].max() == pytest.approx(of_head.max(), abs=1e-3)
    assert (kept["high"][:, 1] >= kept["low"][:, 1] - 1e-3).all()


def test_it_weighs_no_more_than_is_allowed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=range(0, 1500, 5), layers=[f"l.{i}" for i in range(12)], heads=12)
    target = tmp_path / "report.html"
    whole = write_report(run, target).stat().st_size
    least = whole - 10_000
    assert write_report(run, target, most_bytes=least).stat().st_size <= least
    assert "stretches" in Page(target).text
    with pytest.raises(ConfigurationError, match=r"weighs more than 0\.1 MB even with 15 steps"):
        write_report(run, target, most_bytes=100_000)


def test_what_is_there_is_kept_unless_it_may_be_overwritten(tmp_path: Path) -> None:
    run, path = write_run(tmp_path / "run"), tmp_path / "out" / "report.html"
    path.parent.mkdir()
    path.write_text("mine")
    with pytest.raises(ConfigurationError, match=r"report\.html exists; choose another path, or replace it"):
        write_report(run, path, overwrite=False)
    assert path.read_text() == "mine"
    assert write_report(run, str(path)) == path
    assert path.read_text("utf-8").startswith("<!doctype html>")
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, path = write_run(tmp_path / "run"), tmp_path / "out" / "report.html"
    path.parent.mkdir()
    path.write_text("mine")

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(ConfigurationError, match=r"report\.html: No space left on device; choose"):
        write_report(run, path)
    assert path.read_text() == "mine"
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_a_folder_no_runs_and_no_place_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(ConfigurationError, match=r"path is the folder .*name a file in it"):
        write_report(run, tmp_path)
    with pytest.raises(ConfigurationError, match="runs is empty"):
        write_report([], tmp_path / "report.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"cannot write the report to .*file/report\.html"):
        write_report(run, tmp_path / "file" / "report.html")


@pytest.mark.parametrize(("package", "extra"), [("plotly", "web"), ("jinja2", "report")])
def test_a_missing_package_is_named_with_its_extra(package: str, extra: str, tmp_path: Path) -> None:
    code = (
        "from importlib import util\n"
        "real = util.find_spec\n"
        f"util.find_spec = lambda name, *rest: None if name == {package!r} else real(name, *rest)\n"
        "from entropy_monitor.dashboards import write_report\n"
        "try:\n"
        "    write_report('run', 'report.html')\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert f"entropy-monitor[{extra}]" in done.stdout


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (1234567, "1,234,567"), (0.12345, "0.123"), ("a", "a"), (True, "True")]
)
def test_numbers_are_readable(value: object, text: str) -> None:
    assert cell(value) == text
