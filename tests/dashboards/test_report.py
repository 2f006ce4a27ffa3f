from __future__ import annotations

import base64
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from entropy_monitor.analyzer import Analyzer
from entropy_monitor.analyzer.registry import DETECTORS
from entropy_monitor.dashboards.report import _EVIDENCE, cell, write_report
from entropy_monitor.errors import ConfigurationError
from entropy_monitor.records import HEADS, LAYERS, Alert, AlertEvent, Record, RunInfo
from entropy_monitor.run import load_run
from entropy_monitor.store import RunWriter
from tests.analyzer.series import record as head_record
from tests.run_factory import FakeRun, alert, alert_frame, make_run

EVIL = '<script>alert("x")</script><img src=http://evil.example/x onerror=alert(1)>'


class Page(HTMLParser):
    """What a browser would make of the page: its elements, and its text."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text("utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(self.source)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in {"meta", "img", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    runs = [make_run("calm"), make_run("bad", collapsing=True).but(problems=["batch 3 is damaged"])]
    return Page(write_report(runs, tmp_path_factory.mktemp("report") / "new" / "report.html"))


def test_the_summary_comes_first_and_in_words(page):
    order = [
        "1 of 2 runs is sound. In trouble: bad.",
        "What happened, in order",
        "What to change",
        "Run by run",
        "batch 3 is damaged",
        "Entropy has fallen to 3 % of its maximum.",
    ]
    places = [page.text.index(text) for text in order]
    assert places == sorted(places)


def test_the_table_has_a_row_per_run(page):
    cells = re.sub(r"\s+", " ", page.text)
    assert re.search(r"calm 119 12 0\.63\d 87 % b\.2\.attn, head 1, step 0 1\.0× b\.0.* none bad", cells)
    assert re.search(r"bad 119 12 0\.63\d < 0\.1 % b\.0\.attn, head 1, step 110 2,048×", cells)
    assert "6,144" in cells


def test_alert_cards_show_evidence_and_map(page):
    assert "largest logit" in page.text
    assert "212" in page.text
    assert any(image["alt"] == "Attention map of head 1 of b.0.attn" for image in page.all("img"))


def test_the_page_stands_alone(page):
    assert not page.all("script")
    assert not page.all("link")
    for image in page.all("img"):
        assert image["src"].startswith(("data:image/png;base64,", "data:image/svg+xml;base64,"))
        assert len(image["alt"]) > 20
    assert "url(" not in page.source
    assert "@import" not in page.source
    policy = next(m for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none'; img-src data:")
    assert all(link["href"].startswith("#") for link in page.all("a"))


def test_links_lead_to_a_run_each(page):
    ids = [attrs["id"] for _, attrs in page.elements if attrs.get("id")]
    assert len(ids) == len(set(ids))
    assert {link["href"][1:] for link in page.all("a")} <= set(ids)
    assert {attrs["aria-labelledby"] for attrs in page.all("section")} <= set(ids)


def test_images_are_what_they_say(page):
    for image in page.all("img"):
        kind, data = image["src"].split(";base64,")
        start = base64.b64decode(data)[:400]
        assert start.startswith(b"\x89PNG") if kind.endswith("png") else b"<svg" in start


def test_the_page_is_small(page):
    assert len(page.source) < 2_000_000


def test_whatever_a_run_says_is_shown_as_text(tmp_path):
    evil = make_run(EVIL)
    heads = evil.heads.assign(layer=EVIL, layer_index=0)
    poisoned = alert(
        kind=EVIL,
        layer=EVIL,
        heads=[EVIL],
        title=EVIL,
        message=EVIL,
        advice=EVIL,
        evidence={EVIL: EVIL, "worst_head": 0, "call": 0},
    )
    run = evil.but(
        heads=heads,
        alerts=alert_frame([poisoned]),
        info={EVIL: {EVIL: EVIL}},
        plan={EVIL: {EVIL: EVIL}},
        problems=[EVIL],
    )
    page = Page(write_report([run, make_run("other")], tmp_path / "report.html"))
    assert not page.all("script")
    assert not any("onerror" in attrs for _, attrs in page.elements)
    assert not any("evil" in (image["src"] or "") for image in page.all("img"))
    assert page.text.count(EVIL) >= 12


@pytest.mark.parametrize(
    "run",
    [
        FakeRun(),
        make_run(steps=1),
        FakeRun(scalars=make_run().scalars),
        make_run().but(heads=make_run().heads.assign(entropy=np.nan, max_logit=np.inf, sigma_qk=np.nan)),
        make_run().but(alerts=alert_frame([alert(layer="", heads=[], evidence={})])),
        make_run().but(alerts=alert_frame([alert(layer="gone", evidence={"worst_head": 9, "call": 3})])),
        make_run().but(alerts=alert_frame([alert(severity="unheard of")])),
    ],
    ids=["empty", "one step", "loss only", "not finite", "whole run", "layer gone", "severity"],
)
def test_any_run_has_a_report(run, tmp_path):
    page = Page(write_report([run], tmp_path / "report.html"))
    assert run.name in page.text


def test_one_sound_run_is_said_to_be_sound_once(tmp_path):
    page = Page(write_report(make_run(), tmp_path / "report.html"))
    assert page.text.count("Sound: no warning and no severe alert in 12 measured steps.") == 1
    assert "Summary" not in page.text


def test_a_run_from_its_directory(tmp_path):
    made = make_run("bad", collapsing=True, steps=4)
    writer = RunWriter(tmp_path / "bad")
    writer.open(RunInfo(model={"class": "ViT", "parameters": {"w": [2]}}, options={}, versions={}))
    row = made.alerts.to_dict("records")[0]
    for step, rows in made.heads.groupby("step"):
        columns = {c.name: rows[c.name].tolist() for c in HEADS.columns}
        arrays = {
            c.name: columns[c.name] if c.dtype == "str" else np.array(columns[c.name], dtype=c.dtype)
            for c in HEADS.columns
        }
        writer.log(Record(step, arrays))
        if step == row["opened"]:
            fields = {**row, "heads": tuple(row["heads"]), "closed": None}
            writer.alert(AlertEvent("opened", step, Alert(**fields)))
    writer.close()
    page = Page(write_report(load_run(tmp_path / "bad"), tmp_path / "report.html"))
    assert "In trouble since step 30: Attention of b.0.attn is collapsing." in page.text
    assert "Noted while reading" not in page.text
    assert any(image["alt"].startswith("Attention map of head 1") for image in page.all("img"))


@pytest.mark.parametrize("rows", [[[1.0], [1.0, 2.0]], [], "text", 3, [["a", "b"]]])
def test_a_map_that_is_no_matrix_is_left_out(rows, tmp_path):
    evidence = {"map": rows, "max_logit": 7.0}
    run = make_run().but(alerts=alert_frame([alert(evidence=evidence)]))
    page = Page(write_report(run, tmp_path / "report.html"))
    assert not any("Attention map" in image["alt"] for image in page.all("img"))
    assert "largest logit" in page.text


def test_many_alerts_are_cut_and_counted_the_severe_kept(tmp_path):
    rows = [alert(severity="info", opened=i, title=f"small {i}", evidence={}) for i in range(60)] + [
        alert(opened=100, title="grave", evidence={})
    ]
    page = Page(write_report(make_run().but(alerts=alert_frame(rows)), tmp_path / "report.html"))
    assert len(page.all("article")) == 24
    assert "And 37 less severe or later alerts" in page.text
    assert "And 21 more." in page.text
    cards = page.text[page.text.index("And 21 more.") :]
    assert "grave" in cards


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    runs = [make_run("a").but(path=tmp_path / side / "a") for side in ("left", "right")]
    page = Page(write_report(runs, tmp_path / "report.html"))
    assert [link.get("href") for link in page.all("a")][:2] == ["#run-1", "#run-2"]
    assert str(tmp_path / "left" / "a") in page.text
    assert page.text.count(str(tmp_path / "right" / "a")) >= 3


def test_long_runs_are_drawn_in_pixels_and_stay_small(tmp_path):
    run = make_run(layers=24, heads=2, steps=400)
    path = write_report(run, tmp_path / "report.html")
    assert path.stat().st_size < 1_500_000
    assert any(image["src"].startswith("data:image/png") for image in Page(path).all("img"))


def test_what_is_there_is_kept_unless_it_may_be_overwritten(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("mine")
    with pytest.raises(ConfigurationError, match=r"report\.html exists; choose another path, or replace it"):
        write_report(make_run(), path, overwrite=False)
    assert path.read_text() == "mine"
    assert write_report(make_run(), str(path)) == path
    assert path.read_text("utf-8").startswith("<!doctype html>")
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("mine")

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(ConfigurationError, match=r"report\.html: No space left on device; choose"):
        write_report(make_run(), path)
    assert path.read_text() == "mine"
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_a_folder_and_no_runs_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"path is the folder .*name a file in it"):
        write_report(make_run(), tmp_path)
    with pytest.raises(ConfigurationError, match="runs is empty"):
        write_report([], tmp_path / "report.html")


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_missing_package_is_named_with_its_extra(package, tmp_path):
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from entropy_monitor.dashboards.report import write_report\n"
        "from entropy_monitor.errors import MissingExtraError\n"
        "from tests.run_factory import make_run\n"
        f"try:\n    write_report([make_run()], {str(tmp_path / 'r.html')!r})\n"
        "except MissingExtraError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert f"the HTML report needs {package}, which is not installed" in done.stdout
    assert "pip install 'entropy-monitor[report]'" in done.stdout


def test_importing_the_report_loads_neither_matplotlib_nor_jinja2():
    code = (
        "import sys, entropy_monitor.dashboards.report\n"
        "print([name for name in ('matplotlib', 'jinja2') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (3, "3"), (12345, "12,345"), (0.0, "0"), (0.0213, "0.0213"), (1e-5, "1.0e-05"),
     (11273.6, "11,274"), (3.2e9, "3.2e+09"), (float("inf"), "inf"), (float("nan"), "nan"), ("a", "a")],
)  # fmt: skip
def test_numbers_are_readable(value, text):
    assert cell(value) == text


def test_every_figure_of_an_alert_has_a_label():
    """Records that raise every kind of alert, with every column known, leave no key of evidence unnamed."""
    heads = [("a", 0, 0), ("a", 0, 1)]
    known = dict.fromkeys((c.name for c in HEADS.columns if c.nullable and c.name != "max_logit"), 0.5)
    layers = {"a": dict.fromkeys((c.name for c in LAYERS.columns if c.nullable), 0.5)}
    stuck = [
        head_record(10 * i, heads, share=1.0, floor_row=2.0, loss=2.0, layers=layers, max_entropy=2.0)
        for i in range(40)
    ]
    known |= {"floor_row": 1.5, "floor_activation": 0.0, "floor_weights": 0.0}
    ill = [
        head_record(
            500 + 10 * i,
            heads,
            share=0.9 if i < 3 else 0.001,
            max_logit=2.0 if i < 3 else 300.0 * i,
            loss=2.0 if i < 8 else math.nan,
            layers=layers,
            **known,
        )
        for i in range(10)
    ]
    analyzer = Analyzer()
    alerts = [event.alert for record in [*stuck, *ill] for event in analyzer.update(record)]
    assert {alert.kind for alert in alerts} == {detector.kind for detector in DETECTORS}
    produced = {key for alert in alerts for key in alert.evidence} - {"call"}
    assert {"below_floor", "max_logit_growth", "uniform_layers", "update_entropy", "loss"} <= produced
    assert produced == set(_EVIDENCE)


def test_evidence_is_put_in_words(tmp_path):
    evidence = {"sigma_qk_growth": 12.44, "entropy_share": 0.0006, "start_step": 1500000.0}
    run = make_run(collapsing=True).but(alerts=alert_frame([alert(evidence=evidence, heads=[0, 1, 2, 5])]))
    text = Page(write_report([run], tmp_path / "r.html")).text
    assert "σ(W_K W_Qᵀ) / its first value" in text
    for figure in ("12.4×", "< 0.1 %", "1,500,000", "heads 0–2 and 5"):
        assert figure in text.replace("\N{NO-BREAK SPACE}", " ")


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX folders")
def test_a_path_that_cannot_be_written_is_named_with_the_reason(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "r.html"
    with pytest.raises(ConfigurationError, match="cannot write the report to") as refused:
        write_report([make_run()], path)
    assert f"{path}: File exists ({tmp_path / 'file'}); choose a path" in str(refused.value)
