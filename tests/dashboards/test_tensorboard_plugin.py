"""The tab "Attention" within TensorBoard's own application."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.application import TensorBoardWSGI
from tensorboard.plugins.base_plugin import TBContext
from werkzeug.test import Client

from entropy_monitor.dashboards.packing import unpack
from entropy_monitor.dashboards.web import assets
from entropy_monitor_tensorboard import AttentionPlugin, holds_a_run
from tests.dashboards.web.written_runs import write_run

PREFIX = "/data/plugin/entropy_monitor"


def plugin(logdir: Path | None) -> AttentionPlugin:
    return AttentionPlugin(TBContext(logdir=str(logdir) if logdir else ""))


def tensorboard(tab: AttentionPlugin, path_prefix: str = "") -> Client:
    return Client(TensorBoardWSGI([tab], path_prefix=path_prefix))


def test_tensorboard_finds_it_and_its_start_loads_nothing_heavy(tmp_path: Path) -> None:
    script = (
        "import sys; from tensorboard import default; "
        "print(sum(plugin.__name__ == 'AttentionPlugin' for plugin in default.get_dynamic_plugins())); "
        "print({'torch', 'entropy_monitor', 'pandas', 'plotly'} & {n.partition('.')[0] for n in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120, cwd=tmp_path
    )
    assert done.stdout.split() == ["1", "set()"]


def test_it_is_listed_where_there_is_a_run(tmp_path: Path) -> None:
    write_run(tmp_path / "sweep" / "a", [0])
    listed = tensorboard(plugin(tmp_path)).get("/data/plugins_listing").json
    assert listed is not None
    tab = listed["entropy_monitor"]
    assert (tab["enabled"], tab["tab_name"]) == (True, "Attention")
    assert tab["loading_mechanism"] == {"type": "IFRAME", "module_path": f"{PREFIX}/static/tensorboard.js"}


def test_it_is_inactive_where_there_is_none(tmp_path: Path) -> None:
    for logdir in (tmp_path, tmp_path / "missing", None):
        assert not plugin(logdir).is_active()


def test_telling_whether_there_is_a_run_is_cheap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "deep" / "er").mkdir(parents=True)
    (tmp_path / "a" / "deep" / "er" / "run.json").touch()
    assert holds_a_run(tmp_path)
    monkeypatch.setattr("entropy_monitor_tensorboard._MOST_FOLDERS", 3)
    assert not holds_a_run(tmp_path)
    monkeypatch.setattr("entropy_monitor_tensorboard._MOST_FOLDERS", 4)
    assert holds_a_run(tmp_path)


@pytest.mark.parametrize("path_prefix", ["", "/behind/a/proxy"])
def test_the_page_and_its_data_are_served_below_the_plugins_path(tmp_path: Path, path_prefix: str) -> None:
    write_run(tmp_path / "a")
    client = tensorboard(plugin(tmp_path), path_prefix)
    base = path_prefix + PREFIX
    for name in ("tensorboard.js", "main.js", "plotly.js", "style.css"):
        assert client.get(f"{base}/static/{name}").status_code == 200
    answer = unpack(client.get(f"{base}/api/runs").data)
    assert [run["id"] for run in answer["runs"]] == ["a"]
    assert unpack(client.get(f"{base}/api/overview?run=a").data)["measured"] == 6
    assert client.get(f"{base}/api/overview?run=../a").status_code == 404
    assert client.get(f"{base}/static/../app.py").status_code == 404
    assert client.post(f"{base}/api/runs").status_code == 405


def test_its_headers_satisfy_tensorboard(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    client = tensorboard(plugin(tmp_path))
    for path in ("/index.html", "/static/tensorboard.js", "/api/runs", "/none"):
        headers = client.get(PREFIX + path).headers
        assert headers["X-Frame-Options"] == "SAMEORIGIN"
        assert "frame-ancestors 'self'" in headers["Content-Security-Policy"]
    assert not caplog.records  # TensorBoard warns of headers that it finds lacking


def test_whatever_name_tensorboard_has_is_answered(tmp_path: Path) -> None:
    client = tensorboard(plugin(tmp_path))
    assert client.get(f"{PREFIX}/api/runs", headers={"Host": "gpu7.example"}).status_code == 200


def test_without_plotly_the_tab_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "a", [0])
    assets.static_assets.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    tab = plugin(tmp_path)
    client = tensorboard(tab)
    listed = client.get("/data/plugins_listing").json
    assert listed is not None
    assert listed["entropy_monitor"]["enabled"]
    script = client.get(f"{PREFIX}/static/tensorboard.js")
    assert script.content_type.startswith("text/javascript")
    assert "export function render()" in script.text
    assert json.dumps("entropy-monitor[web]")[1:-1] in script.text


def test_without_a_logdir_the_tab_says_so() -> None:
    script = tensorboard(plugin(None)).get(f"{PREFIX}/static/tensorboard.js")
    assert "--logdir" in script.text
