from __future__ import annotations

import numpy as np
import pytest

from entropy_monitor.dashboards.packing import pack
from entropy_monitor.dashboards.run_view import OF_LAYER, RunView
from entropy_monitor.dashboards.shown_columns import HEAD_COLUMNS, LAYER_COLUMNS
from entropy_monitor.records import Record
from entropy_monitor.store import RunWriter
from tests.dashboards.naive_view import NaiveView, buckets, compact
from tests.dashboards.run_dirs import written
from tests.run_factory import make_run, read_seldom
from tests.store.random_runs import Shape, record, write
from tests.store.samples import info

SHAPES = {"regular": Shape(changing=0, broken=0, calls=2), "odd": Shape(layers=4, changing=0.3, broken=0.3)}
HEAD_NAMES = [column.name for column in HEAD_COLUMNS]
LAYER_NAMES = [column.name for column in LAYER_COLUMNS]


@pytest.fixture(scope="module", params=SHAPES)
def run_dir(request, tmp_path_factory):
    """A run of two sessions that overlap."""
    path = tmp_path_factory.mktemp(request.param)
    g = np.random.default_rng(0)
    write(path, g, range(-30, 200, 10), SHAPES[request.param], close=False)
    write(path, g, range(150, 310, 10), SHAPES[request.param])
    return path


@pytest.fixture
def view(run_dir):
    return RunView(run_dir)


@pytest.fixture(scope="module")
def naive(run_dir):
    return NaiveView(run_dir)


def assert_series(found, expected):
    steps, values = compact(*expected)
    assert found["steps"].dtype == np.float64
    assert found["steps"].tolist() == steps
    assert found["values"].dtype == np.float32
    np.testing.assert_allclose(found["values"], values, rtol=1e-5, atol=1e-6)


def test_an_overview_lists_what_there_is(view, naive):
    found = view.overview()
    assert [(layer["name"], layer["index"]) for layer in found["layers"]] == [
        (name, i) for i, name in enumerate(naive.layers)
    ]
    rows = [(naive.layers.index(name), call, head) for name, call, head in naive.rows]
    columns = (found["rows"][name] for name in ("layer", "call", "head"))
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == rows
    assert all(column.dtype == np.int32 for column in found["rows"].values())
    assert found["positions"].tolist() == naive.steps["heads"]
    assert [c["name"] for c in found["columns"]] == HEAD_NAMES
    shown = [name.removeprefix(OF_LAYER) for name in (c["name"] for c in found["layer_columns"])]
    assert shown == LAYER_NAMES
    assert found["scalars"] == ["loss", "η"]
    assert (found["problems"], found["problem"]) == ([], None)
    assert [a["opened"] for a in found["alerts"]] == sorted(naive.run.alerts["opened"])
    assert found.keys() >= view.card().keys() >= {
        "name", "verdict", "words", "model", "is_live", "first_step", "last_step", "measured", "layers",
        "heads", "final_loss", "broken_loss", "end_share", "lowest_share", "sigma_growth", "largest_logit",
        "alerts", "open_alerts", "version", "problem",
    }  # fmt: skip


def test_every_answer_can_be_packed(view):
    answers = [view.card(), view.overview(), view.summary_curves(), view.scalar("η"), view.head(0)]
    answers += [view.grid(name, 0) for name in HEAD_NAMES]
    answers += [view.curves(name) for name in (*HEAD_NAMES, *LAYER_NAMES)]
    answers += [view.matrix(name) for name in HEAD_NAMES]
    for answer in answers:
        pack(answer)


@pytest.mark.parametrize("points", [600, 16, 5])
def test_curves_are_means_within_their_ends(view, naive, points):
    for column in [*HEAD_NAMES, "grad_l2", OF_LAYER + "sigma_q"]:
        table = "heads" if column in HEAD_NAMES else "layers"
        found = view.curves(column, [2, 0], points)
        assert (found["column"], found["remark"]) == (column, "")
        assert [band["layer"] for band in found["layers"]] == [2, 0]
        bands = [(band, column) for band in found["layers"]]
        bands += [(band, "max_entropy") for band in found["maximum"]]
        assert len(bands) == (4 if column == "entropy" else 2)
        for band, name in bands:
            expected = naive.band(name.removeprefix(OF_LAYER), band["layer"], points, table)
            assert band["steps"].tolist() == expected["steps"]
            for end in ("mean", "low", "high"):
                np.testing.assert_allclose(band[end], expected[end], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("positions", [400, 7])
def test_a_grid_is_the_worst_of_its_position(view, naive, positions):
    view.most_positions = positions
    count = len(view.overview()["positions"])
    assert count == len(buckets(len(naive.steps["heads"]), positions))
    for column in HEAD_NAMES:
        cube = naive.cube(column)
        known = cube[np.isfinite(cube)]
        for position in (0, count // 2, count - 1):
            found = view.grid(column, position)
            assert (found["column"], found["position"], found["values"].dtype) == (
                column,
                position,
                np.float32,
            )
            assert found["step"] == naive.steps["heads"][buckets(len(cube), positions)[position].start]
            expected = naive.grid(column, position, positions)
            np.testing.assert_allclose(found["values"], expected, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose([found["low"], found["high"]], [known.min(), known.max()], rtol=1e-5)


def test_a_figure_that_is_read_seldom_is_carried_on_for_a_while(tmp_path):
    run = read_seldom(make_run(collapsing=True, steps=90, layers=1, heads=1), every=80)
    run = run.but(scalars=run.scalars[:0])
    view = RunView(written(run, tmp_path))
    values = [float(view.grid("sigma_qk", position)["values"][0]) for position in range(90)]
    assert values[:65] == [1.0] * 65
    assert np.isnan(values[65:80]).all()
    assert values[80] == float(np.float32(2.0**80))
    assert np.isfinite(view.grid("max_logit", 89)["values"]).all()


def test_a_head_in_full(view, naive):
    rows = range(0, len(naive.rows), 3)
    for row in rows:
        found = view.head(row, points=1000)
        assert (found["layer"], found["call"], found["head"]) == naive.rows[row]
        for name in HEAD_NAMES:
            assert_series(found["series"][name], (naive.steps["heads"], naive.cube(name)[:, row]))
        layer = naive.layers.index(naive.rows[row][0])
        for name in LAYER_NAMES:
            values = naive.cube(name, "layers")[:, layer]
            assert_series(found["layer_series"][name], (naive.steps["layers"], values))
        entropy, there = naive.cube("entropy")[:, row], ~np.isnan(naive.cube("layer_index")[:, row])
        broken = there & ~np.isfinite(entropy)
        assert found["broken"].tolist() == np.array(naive.steps["heads"])[broken].tolist()


def test_a_head_with_few_points_keeps_its_extremes(view, naive):
    for name in ("entropy", "max_logit"):
        values = naive.cube(name)[:, 0]
        found = view.head(0, points=8)["series"][name]
        assert len(found["steps"]) <= 8
        known = values[np.isfinite(values)]
        np.testing.assert_allclose([found["values"].min(), found["values"].max()], [known.min(), known.max()])
        where = dict(zip(naive.steps["heads"], values, strict=True))
        np.testing.assert_allclose(found["values"], [where[step] for step in found["steps"]], rtol=1e-6)


def test_curves_of_the_whole_run(view, naive):
    found = view.summary_curves(points=600)
    share = naive.cube("entropy_share")
    assert found["share"]["steps"].tolist() == naive.steps["heads"]
    for i, row in enumerate(share):
        known = row[np.isfinite(row)]
        ends = (known.mean(), known.min()) if known.size else (np.nan, np.nan)
        drawn = found["share"]["mean"][i], found["share"]["low"][i]
        np.testing.assert_allclose(drawn, ends, rtol=1e-5)
    assert_series(found["sigma"], naive.largest("sigma_qk"))
    assert_series(found["logit"], naive.largest("max_logit"))
    assert_series(found["loss"], naive.scalar("loss"))


def test_scalars(tmp_path):
    writer = RunWriter(tmp_path)
    writer.open(info())
    values = np.array([3.0, np.nan, 1.0, np.inf, 2.0])
    names = {"step": np.array([0, 1, 2, 3, 4]), "name": ["loss"] * 5, "value": values}
    writer.log(Record(4, record(np.random.default_rng(0), 4, Shape()).heads, scalars=names))
    writer.close()
    found = RunView(tmp_path).scalar()
    assert (found["steps"].tolist(), found["values"].tolist()) == ([0, 2, 4], [3, 1, 2])
    assert found["broken"].tolist() == [1, 3]
    empty = RunView(tmp_path).scalar("other")
    assert (empty["name"], len(empty["steps"]), len(empty["values"]), len(empty["broken"])) == (
        "other",
        0,
        0,
        0,
    )


@pytest.mark.parametrize("most", [400, 5])
def test_a_whole_column_for_a_page_without_a_server(view, naive, most):
    view.most_positions = most
    for column, table in [(name, "heads") for name in HEAD_NAMES] + [
        (name, "layers") for name in LAYER_NAMES
    ]:
        found = view.matrix(column, of_layers=table == "layers")
        cube = naive.cube(column, table)
        parts = buckets(len(cube), most)
        assert found["steps"].tolist() == [naive.steps[table][part.start] for part in parts]
        for end, reduce in (("low", np.fmin.reduce), ("high", np.fmax.reduce)):
            expected = np.array([reduce(cube[part.start : part.stop]) for part in parts])
            if most > len(cube) and end == "high":
                assert found["high"] is None
            else:
                np.testing.assert_allclose(found[end], expected, rtol=1e-5, atol=1e-6)
        of_step = [[nanmean(row[naive.of_layer(i, table)]) for i in range(len(naive.layers))] for row in cube]
        expected = [
            [nanmean(column) for column in np.array(of_step)[part.start : part.stop].T] for part in parts
        ]
        np.testing.assert_allclose(found["mean"], expected, rtol=1e-5, atol=1e-6)


def nanmean(values):
    values = np.asarray(values)[np.isfinite(values)]
    return values.mean() if values.size else np.nan
