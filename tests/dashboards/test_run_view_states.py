from __future__ import annotations

import os
import re
import shutil
import time

import numpy as np
import pytest

from entropy_monitor.dashboards.packing import pack
from entropy_monitor.dashboards.run_view import RunView
from entropy_monitor.errors import ConfigurationError, RunDirectoryError
from entropy_monitor.records import Record
from entropy_monitor.store import RunWriter, documents
from tests.dashboards.naive_view import NaiveView
from tests.dashboards.run_dirs import written
from tests.run_factory import FakeRun, alert, alert_frame, make_run, read_seldom
from tests.store.random_runs import Shape, record, session
from tests.store.samples import info


@pytest.fixture
def g():
    return np.random.default_rng(0)


def test_a_card_says_what_the_digest_says(tmp_path):
    path = written(make_run("bad", collapsing=True), tmp_path / "bad")
    view = RunView(path)
    card = view.card()
    assert (card["name"], card["verdict"], card["model"]) == ("bad", "trouble", "ViT")
    assert (card["layers"], card["heads"], card["measured"]) == (3, 6, 12)
    assert (card["first_step"], card["last_step"], card["is_live"], card["problem"]) == (0, 119, False, None)
    assert (card["alerts"], card["open_alerts"]) == ({"severe": 1, "warning": 0, "info": 0}, 1)
    lowest = view.digest.lowest_share
    assert card["lowest_share"] == {
        "value": lowest.value, "layer": "b.0.attn", "call": 0, "head": 1, "row": 1, "step": 110,
    }  # fmt: skip
    assert card["words"] == view.digest.words
    assert RunView(path, "mine").card()["name"] == "mine"


def test_an_empty_run(tmp_path):
    view = RunView(written(FakeRun(), tmp_path))
    card, overview = view.card(), view.overview()
    assert (card["verdict"], card["first_step"], card["last_step"], card["heads"]) == (
        "unknown",
        None,
        None,
        0,
    )
    assert (overview["columns"], overview["layers"], len(overview["positions"])) == ([], [], 0)
    assert view.curves("entropy")["layers"] == view.curves("grad_l2")["layers"] == []
    assert len(view.summary_curves()["share"]["steps"]) == 0
    assert view.matrix("entropy")["mean"].shape == (0, 0)
    for answer in (card, overview, view.curves("entropy"), view.summary_curves(), view.matrix("entropy")):
        pack(answer)
    with pytest.raises(ConfigurationError, match="this run has 0"):
        view.grid("entropy", 0)


def test_names_that_are_not_there(tmp_path, g):
    view = RunView(written(make_run(), tmp_path))
    for ask in (
        lambda: view.curves("other"),
        lambda: view.curves("entropy", [3]),
        lambda: view.curves("entropy", [-1]),
        lambda: view.default_layers("other"),
        lambda: view.grid("other", 0),
        lambda: view.grid("grad_l2", 0),
        lambda: view.grid("entropy", 12),
        lambda: view.grid("entropy", -1),
        lambda: view.head(6),
        lambda: view.head(-1),
        lambda: view.matrix("grad_l2"),
        lambda: view.matrix("entropy", of_layers=True),
        lambda: view.attention_map("other"),
    ):
        with pytest.raises(ConfigurationError):
            ask()


def test_attention_maps_of_alerts(tmp_path):
    alerts = alert_frame([alert(), alert(id="b", opened=40, evidence={"entropy": 1.0})])
    view = RunView(written(make_run().but(alerts=alerts), tmp_path))
    first, second = view.overview()["alerts"]
    assert (first["has_map"], second["has_map"]) == (True, False)
    assert (first["rows"], first["worst_row"], first["layer_place"]) == ((0, 1), 1, 0)
    found = view.attention_map(first["key"])
    np.testing.assert_array_equal(found["map"], np.array([[0.9, 0.1], [0.2, 0.8]], np.float32))
    assert found["alt"] == "Attention map of head 1 of b.0.attn"
    with pytest.raises(ConfigurationError, match="has no attention map"):
        view.attention_map(second["key"])


@pytest.mark.parametrize(("column", "worst"), [("entropy_share", 9), ("max_logit", 6), ("sigma_v", 13)])
def test_of_many_layers_eight_are_shown_and_the_worst(tmp_path, column, worst):
    run = make_run(layers=20, heads=1, steps=2)
    heads = run.heads.assign(max_logit=np.where(run.heads["layer_index"] == 6, 9.0, 1.0))
    heads["entropy"] = np.where(heads["layer_index"] == 9, 0.01, heads["entropy"])
    layers = run.layers.assign(sigma_v=np.where(run.layers["layer_index"] == 13, 7.0, 1.0))
    path = written(run.but(heads=heads, layers=layers, scalars=run.scalars[:0]), tmp_path)
    view, naive = RunView(path), NaiveView(path)
    found = view.curves(column)
    shown = [band["layer"] for band in found["layers"]]
    assert naive.worst_layer(column, "layers" if column == "sigma_v" else "heads") == worst
    assert worst in shown
    assert (len(shown), shown) == (8, sorted(shown))
    assert {0, 19} <= set(shown)
    ends = "lowest" if column == "entropy_share" else "largest"
    assert found["remark"] == f"8 of 20 layers, evenly spaced, and the one with the {ends} value"
    assert view.default_layers(column) == (shown, found["remark"])
    assert view.curves("entropy")["layers"][0]["layer"] == 0


def test_layers_that_have_no_rows_of_heads_and_the_reverse(tmp_path, g):
    writer = RunWriter(tmp_path)
    writer.open(info())
    full = record(g, 0, Shape(changing=0, broken=0))
    cut = {name: values[1:] for name, values in full.layers.items()}
    late = {name: values[-2:] for name, values in full.heads.items()}
    writer.log(Record(0, late, cut))
    writer.close()
    view = RunView(tmp_path)
    overview = view.overview()
    names = [layer["name"] for layer in overview["layers"]]
    assert names == ["Schicht-ü.注意", "b,1\nnext"]
    assert overview["rows"]["layer"].tolist() == [0, 0]
    assert view.curves("entropy", [0, 1])["layers"][1]["steps"].tolist() == []
    matrix = view.matrix("sigma_v", of_layers=True)
    np.testing.assert_array_equal(matrix["low"][0], full.layers["sigma_v"][[2, 1]])
    assert view.head(0)["layer_series"]["sigma_v"]["values"].tolist() == [float(full.layers["sigma_v"][2])]

    without = {name: values[:1] for name, values in full.layers.items()}
    other = tmp_path / "other"
    writer = RunWriter(other)
    writer.open(info())
    writer.log(Record(0, late, without))
    writer.close()
    assert RunView(other).head(0)["layer_series"] == {}


def test_the_largest_value_waits_for_heads_that_are_read_seldom(tmp_path):
    run = make_run(collapsing=True, steps=9, layers=2, heads=1)
    run = read_seldom(run.but(scalars=run.scalars[:0]), suspects=["b.0.attn"])
    path = written(run, tmp_path)
    found = RunView(path).summary_curves()["sigma"]
    assert (found["steps"].tolist(), found["values"].tolist()) == NaiveView(path).largest("sigma_qk")
    assert found["steps"].tolist() == [0, 40, 80]


def test_a_view_follows_a_run_that_grows(tmp_path, g):
    turns = session(tmp_path, g, range(0, 200, 10), flush_every=1)
    next(turns)
    view = RunView(tmp_path)
    seen = {view.refresh()}
    for number, _ in enumerate(turns, 1):
        version = view.refresh()
        assert version not in seen
        assert view.refresh() == version
        seen.add(version)
        card = view.card()
        assert card["is_live"] == (number <= 20)
        if number <= 20:
            assert (card["measured"], card["last_step"]) == (number, 10 * (number - 1))
            assert len(view.overview()["positions"]) == number
            assert len(view.grid("entropy", number - 1)["values"]) == card["heads"]
    fresh = RunView(tmp_path)
    for answer in ("card", "overview", "summary_curves"):
        found, expected = getattr(view, answer)(), getattr(fresh, answer)()
        for made in (found, expected):
            made.pop("version", None)
        assert pack(found) == pack(expected)


def test_a_run_that_stopped_without_a_word_is_live_for_five_minutes(tmp_path, g):
    path = written(make_run(), tmp_path, close=False)
    view = RunView(path)
    version = view.version
    assert view.card()["is_live"]
    for file in path.iterdir():
        os.utime(file, (time.time() - 301,) * 2)
    assert view.refresh() != version
    assert not view.card()["is_live"]


def test_damage_is_told_and_a_run_that_vanishes_is_an_error(tmp_path):
    path = written(make_run(), tmp_path / "a", flush_every=3)
    file = path / "heads-000-000.arrows"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    view = RunView(path)
    view.card()
    version = view.version
    assert view.refresh() != version
    assert re.match(r"heads-000-000.arrows: batch \d damaged", view.overview()["problems"][0])
    assert view.problems == view.overview()["problems"]
    assert view.card()["measured"] == 9
    shutil.rmtree(path)
    with pytest.raises(RunDirectoryError, match="can be read no more"):
        view.head(0)
    with pytest.raises(RunDirectoryError, match="does not exist"):
        view.refresh()
    with pytest.raises(RunDirectoryError):
        RunView(path)


def test_damage_is_known_at_once_when_a_view_is_verified(tmp_path):
    path = written(make_run(), tmp_path)
    file = path / "layers-000-000.arrows"
    data = bytearray(file.read_bytes())
    data[-50] ^= 1
    file.write_bytes(data)
    view = RunView(path)
    assert (view.card()["verdict"], view.problems) == ("sound", [])
    version = view.version
    view.verify()
    assert (view.card()["verdict"], len(view.problems)) == ("watch", 1)
    assert view.version != version


@pytest.mark.parametrize("model", [None, 3, "Name", ["a"], {"class": ["x"]}, {}])
def test_what_another_version_wrote_in_run_json(tmp_path, model):
    path = written(make_run(), tmp_path)
    (path / "run.json").unlink()
    documents.create(path / "run.json", {"format": 1, "model": model, "options": 5})
    view = RunView(path)
    assert isinstance(view.card()["model"], str)
    pack(view.overview())


def test_names_that_hold_html_are_left_as_they_are(tmp_path):
    name = "<script>alert(1)</script>"
    run = make_run(layers=1)
    heads, layers = (table.assign(layer=name) for table in (run.heads, run.layers))
    scalars = run.scalars.assign(name=name)
    alerts = alert_frame([alert(layer=name, title=name, message=name, advice=name)])
    run = run.but(heads=heads, layers=layers, scalars=scalars, alerts=alerts, plan={name: {"source": name}})
    overview = RunView(written(run, tmp_path)).overview()
    assert overview["layers"] == [{"name": name, "index": 0}]
    assert (overview["scalars"], overview["plan"]) == ([name], [(name, f"source: {name}")])
    assert overview["alerts"][0]["title"] == overview["advice"][0]["text"] == name


def test_a_long_run_is_shown_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("entropy_monitor.store.levels.BLOCK", 4)
    run = make_run(collapsing=True, steps=40, layers=2, heads=2)
    path = written(run.but(scalars=run.scalars[:0]), tmp_path, flush_every=100)
    exact = NaiveView(path)
    view = RunView(path)
    view._run.heads._most_cells = 100
    view._run._seen = None
    view.refresh()
    assert view._run.heads.in_blocks
    overview = view.overview()
    assert overview["positions"].tolist() == list(range(0, 400, 40))
    assert (overview["measured"], overview["last_step"]) == (40, 390)
    share = exact.cube("entropy_share").reshape(10, 4, 4)
    for position in range(10):
        np.testing.assert_allclose(
            view.grid("entropy_share", position)["values"], share[position].min(axis=0), rtol=1e-5
        )
    series = view.head(0)["series"]["entropy_share"]
    assert (series["values"].min(), series["values"].max()) == pytest.approx(
        (share[..., 0].min(), share[..., 0].max())
    )
    band = view.curves("entropy_share")["layers"][0]
    np.testing.assert_allclose(band["low"], share[:, :, :2].min(axis=(1, 2)), rtol=1e-5)
    np.testing.assert_allclose(band["high"], share[:, :, :2].max(axis=(1, 2)), rtol=1e-5)
    np.testing.assert_allclose(band["mean"], share[:, :, :2].mean(axis=(1, 2)), rtol=1e-5)
    matrix = view.matrix("entropy_share")
    np.testing.assert_allclose(matrix["high"], share.max(axis=1), rtol=1e-5)
    pack(overview)
