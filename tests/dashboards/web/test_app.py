"""The WSGI app: answers, refusals, headers."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from werkzeug.test import Client, TestResponse

from entropy_monitor.dashboards.packing import unpack
from entropy_monitor.dashboards.run_view import RunView
from entropy_monitor.dashboards.web import app, assets, create_app
from entropy_monitor.errors import MissingExtraError
from tests.dashboards.web.written_runs import MAP, alert, write_run

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "a", alerts=[alert(20)])
    write_run(folder / "sweep" / "lr=0.1 & more", layers=[f"blocks.{i}.attn" for i in range(20)])
    (folder / "secret.txt").write_text("not for you")
    return folder


@pytest.fixture(scope="module")
def client(folder: Path) -> Client:
    return Client(create_app(folder, loopback_only=True))


def data(response: TestResponse) -> Any:
    assert response.status_code == 200, response.text
    assert response.content_type == "application/octet-stream"
    return unpack(response.data)


def error(response: TestResponse) -> str:
    assert response.content_type == "application/json"
    return str(json.loads(response.data)["error"])


def test_the_page_is_there_with_all_it_names(client: Client) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert client.get("/index.html").data == page.data
    for name in ("style.css", "plotly.js", "page.js", "icon.svg"):
        assert f"static/{name}" in page.text
        answer = client.get(f"/static/{name}")
        assert answer.status_code == 200
        assert answer.data
    assert "://" not in page.text


def test_no_file_of_the_page_names_another_server() -> None:
    for name, asset in assets.static_assets().items():
        if name != "plotly.js":
            text = asset.data.decode().replace("http://www.w3.org/2000/svg", "")
            assert "http://" not in text, name
            assert "https://" not in text, name


def test_runs_are_listed_with_their_cards(client: Client, folder: Path) -> None:
    answer = data(client.get("/api/runs"))
    assert answer["folder"] == str(folder)
    assert [run["id"] for run in answer["runs"]] == ["a", "sweep/lr=0.1 & more"]
    assert [run["verdict"] for run in answer["runs"]] == ["trouble", "sound"]


def test_every_question_is_answered_as_the_view_does(client: Client, folder: Path) -> None:
    view = RunView(folder / "a")
    view.refresh()
    (key,) = [row["key"] for row in view.overview()["alerts"]]
    questions = {
        "overview": ({}, view.overview()),
        "curves": ({"column": "entropy"}, view.curves("entropy")),
        "summary": ({}, view.summary_curves()),
        "grid": ({"column": "entropy_share", "position": "2"}, view.grid("entropy_share", 2)),
        "head": ({"row": "1"}, view.head(1)),
        "scalar": ({}, view.scalar()),
        "map": ({"alert": key}, view.attention_map(key)),
    }
    for name, (parameters, expected) in questions.items():
        answer = data(client.get(f"/api/{name}", query_string={"run": "a", **parameters}))
        assert answer.keys() == expected.keys(), name
        same(answer, expected)


def same(answer: Any, expected: Any) -> None:
    """Equal as far as packing keeps things apart."""
    if isinstance(expected, np.ndarray):
        np.testing.assert_allclose(answer, expected, rtol=1e-3, atol=1e-3)
    elif isinstance(expected, dict):
        for key, value in expected.items():
            same(answer[key], value)
    elif isinstance(expected, (list, tuple)):
        assert len(answer) == len(expected)
        for one, other in zip(answer, expected, strict=True):
            same(one, other)
    else:
        assert answer == expected


def test_layers_are_asked_for_by_place(client: Client) -> None:
    run = "sweep/lr=0.1 & more"
    some = data(client.get("/api/curves", query_string={"run": run, "column": "entropy", "layers": "3,17"}))
    assert [curve["layer"] for curve in some["layers"]] == [3, 17]
    chosen = data(client.get("/api/curves", query_string={"run": run, "column": "entropy", "layers": ""}))
    assert 1 < len(chosen["layers"]) <= 8


def test_the_map_of_an_alert_is_the_one_that_was_kept(client: Client) -> None:
    (key,) = [row["key"] for row in data(client.get("/api/overview?run=a"))["alerts"]]
    answer = data(client.get("/api/map", query_string={"run": "a", "alert": key}))
    np.testing.assert_allclose(answer["map"], MAP, atol=1e-4)


@pytest.mark.parametrize(
    ("query", "status", "says"),
    [
        ("overview", 400, "run is missing"),
        ("overview?run=none", 404, "no such run"),
        ("overview?run=../a", 404, "no such run"),
        ("overview?run=..%2F..%2Fetc", 404, "no such run"),
        ("overview?run=%00", 404, "no such run"),
        ("overview?run=%ff%fe", 404, "no such run"),
        ("grid?run=a&column=entropy", 400, "position is missing"),
        ("grid?run=a&column=entropy&position=1e3", 400, "whole number"),
        ("grid?run=a&column=entropy&position=-1", 400, "position is -1"),
        ("grid?run=a&column=entropy&position=999999999", 400, "position is 999999999"),
        ("grid?run=a&column=__class__&position=0", 400, "__class__"),
        ("grid?run=a&column=entropy&position=99999999999999999999", 400, "whole number"),
        ("head?run=a&row=6", 400, "row is 6"),
        ("head?run=a&row=0&points=1000000", 400, "points must be"),
        ("head?run=a&row=0&points=0", 400, "points must be"),
        ("curves?run=a&column=entropy&layers=0,x", 400, "whole number"),
        ("curves?run=a&column=entropy&layers=99", 400, "layer"),
        ("curves?run=a&column=entropy&layers=" + ",".join("0" * 65), 400, "65"),
        ("curves?run=a&column=%3Cscript%3E", 400, "<script>"),
        ("map?run=a&alert=none", 400, "none"),
        ("nothing", 404, "nothing at this address"),
        ("runs/more", 404, "nothing at this address"),
    ],
)
def test_malformed_questions_are_refused_in_words(client: Client, query: str, status: int, says: str) -> None:
    answer = client.get(f"/api/{query}")
    assert answer.status_code == status
    assert says in error(answer)


@pytest.mark.parametrize(
    "path",
    [
        "/secret.txt", "/static/../app.py", "/static/..%2fapp.py", "/static/", "/static",
        "/static//etc/passwd",
        "/static/%2e%2e/%2e%2e/setup.cfg", "//etc/passwd", "/a/run.json", "/api", "/api/", "/index.html/more",
        "/static/plotly.js/more", "/static/__init__.py", "/\x00", "/static/style.css%00.js",
    ],
)  # fmt: skip
def test_only_the_pages_own_files_are_served(client: Client, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 404
    assert "nothing at this address" in error(answer)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"])
def test_nothing_can_be_changed(client: Client, method: str) -> None:
    answer = client.open("/api/runs", method=method, data=b"x" * 10_000)
    assert answer.status_code == 405
    assert answer.headers["Allow"] == "GET, HEAD"
    assert method in error(answer)


def test_a_query_without_end_is_refused(client: Client) -> None:
    assert client.get("/api/overview?run=" + "a" * 10_000).status_code == 414


def test_head_answers_without_a_body(client: Client) -> None:
    for path in ("/", "/api/runs", "/static/plotly.js"):
        asked, told = client.get(path), client.head(path)
        assert told.status_code == 200
        assert told.data == b""
        assert told.headers["Content-Length"] == asked.headers["Content-Length"]


@pytest.mark.parametrize("path", ["/", "/api/runs", "/static/main.js", "/none", "/api/overview?run=x"])
def test_every_answer_carries_the_protective_headers(client: Client, path: str) -> None:
    headers = client.get(path).headers
    for name, value in HEADERS.items():
        assert headers[name] == value
    policy = dict(rule.split(" ", 1) for rule in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == "'self'"
    assert policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert "Cache-Control" in headers


def test_the_page_may_be_framed_where_that_was_asked_for(folder: Path) -> None:
    headers = Client(create_app(folder, framed=True)).get("/").headers
    assert headers["X-Frame-Options"] == "SAMEORIGIN"
    assert "frame-ancestors 'self'" in headers["Content-Security-Policy"]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:9000", 200),
        ("127.0.0.1:6007", 200),
        ("[::1]:6007", 200),
        ("127.8.8.8", 200),
        ("LOCALHOST.:80", 200),
        ("runs.localhost:6007", 200),
        ("evil.example", 403),
        ("evil.example:6007", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("192.168.0.7:6007", 403),
        ("", 403),
    ],
)
def test_another_name_than_this_machines_is_refused(client: Client, host: str, status: int) -> None:
    for path in ("/", "/api/runs", "/static/main.js"):
        answer = client.get(path, headers={"Host": host})
        assert answer.status_code == status
    if status == 403:
        assert "localhost" in error(answer)


def test_where_any_host_is_right_any_host_is_answered(folder: Path) -> None:
    assert Client(create_app(folder)).get("/api/runs", headers={"Host": "gpu7.example"}).status_code == 200


def test_a_fault_of_ours_is_told_without_its_insides(
    client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(view: RunView) -> Iterator[None]:
        raise ZeroDivisionError("inside information")

    monkeypatch.setattr(RunView, "overview", fails)
    answer = client.get("/api/overview?run=a")
    assert answer.status_code == 500
    assert "inside" not in answer.text
    assert "Traceback" not in answer.text
    assert "log" in error(answer)
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "inside information" in caplog.text


def test_files_are_sent_once_and_then_confirmed(client: Client) -> None:
    first = client.get("/static/plotly.js")
    again = client.get("/static/plotly.js", headers={"If-None-Match": first.headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")
    assert again.headers["X-Content-Type-Options"] == "nosniff"
    assert client.get("/api/runs").headers["Cache-Control"] == "no-store"


def test_what_is_large_is_sent_compressed_to_who_can_read_that(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "Content-Encoding" not in client.get("/api/runs", headers={"Accept-Encoding": "gzip"}).headers
    monkeypatch.setattr(app, "_WORTH_COMPRESSING", 1000)
    query = {"run": "sweep/lr=0.1 & more"}
    for path in ("/static/plotly.js", "/api/overview"):
        whole = client.get(path, query_string=query)
        small = client.get(path, query_string=query, headers={"Accept-Encoding": "gzip, br"})
        assert "Content-Encoding" not in whole.headers
        assert small.headers["Content-Encoding"] == "gzip"
        assert gzip.decompress(small.data) == whole.data
        assert len(small.data) < len(whole.data)
        refused = client.get(path, query_string=query, headers={"Accept-Encoding": "gzip;q=0"})
        assert "Content-Encoding" not in refused.headers


def test_without_plotly_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assets.static_assets.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"entropy-monitor\[web\]"):
        create_app(tmp_path)


def test_the_page_names_all_modules_that_it_will_import(client: Client) -> None:
    def imported(name: str) -> set[str]:
        found = set(re.findall(r'from "\./(\w+\.js)"', client.get(f"/static/{name}").text))
        return found.union(*(imported(inner) for inner in found))

    named = set(re.findall(r'rel="modulepreload" href="static/(\w+\.js)"', client.get("/").text))
    assert named == imported("page.js")
