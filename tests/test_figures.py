from __future__ import annotations

import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.collections import PolyCollection, QuadMesh
from matplotlib.figure import Figure

from entropy_monitor import figures
from entropy_monitor.errors import ConfigurationError
from entropy_monitor.figures import style
from entropy_monitor.records import HEADS
from tests.run_factory import MAXIMUM, FakeRun, alert, alert_frame, frame, make_run

AXES_FIGURES = {
    "entropy": figures.entropy,
    "sigma": figures.sigma,
    "floors": lambda run, **kw: figures.floors(run, "b.0.attn", 0, **kw),
    "heatmap": figures.heatmap,
}


def draw(made):
    """Renders to pixels: text that cannot be parsed and empty scales fail here, not before."""
    figure = made if isinstance(made, Figure) else made.figure
    figure.savefig("/dev/null", format="png", dpi=40)
    return figure


def labels(ax):
    return [text.get_text().strip() for text in ax.get_legend().get_texts()] if ax.get_legend() else []


def texts(ax):
    return " ".join(text.get_text() for text in ax.texts)


def line(ax, label):
    return next(line for line in ax.lines if line.get_label() == label)


def broken_run():
    run = make_run(layers=2, heads=2, steps=6)
    heads = run.heads.copy()
    heads.loc[::3, ["entropy", "max_logit", "sigma_qk"]] = np.nan
    heads.loc[1::5, ["entropy", "sigma_qk"]] = np.inf
    scalars = run.scalars.copy()
    scalars.loc[5:, "value"] = np.nan
    return run.but(heads=heads, scalars=scalars)


def null_run():
    run = make_run(steps=3)
    nullable = [c.name for c in HEADS.columns if c.nullable]
    return run.but(heads=run.heads.assign(**dict.fromkeys(nullable, np.nan)))


RUNS = {
    "sound": make_run(),
    "collapsing": make_run("bad", collapsing=True),
    "empty": FakeRun(),
    "one step": make_run(steps=1),
    "not finite": broken_run(),
    "all null": null_run(),
    "one key": make_run(steps=2).but(heads=make_run(steps=2).heads.assign(max_entropy=0.0, entropy=0.0)),
    "constant": make_run(steps=4, layers=1, heads=1),
    "hostile name": make_run(r"_$\frac{ $x^$ <b>" + "\n\x00"),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
@pytest.mark.parametrize("name", AXES_FIGURES)
def test_axes_figures_draw_any_run(name, run):
    ax = AXES_FIGURES[name](run)
    draw(ax)
    assert ax.get_xlabel() == "training step"
    assert ax.get_title(loc="left")


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
def test_whole_figures_draw_any_run(run):
    draw(figures.overview(run))
    draw(figures.compare([run, make_run()]))


@pytest.mark.parametrize("name", AXES_FIGURES)
def test_given_axes_are_drawn_on_and_returned(name):
    ax = Figure().subplots()
    assert AXES_FIGURES[name](make_run(), ax=ax) is ax


def test_given_figures_are_drawn_on_and_returned():
    figure = Figure()
    assert figures.overview(make_run(), figure=figure) is figure
    figure = Figure()
    assert figures.compare([make_run()], figure=figure) is figure


def test_pyplot_and_rcparams_are_left_alone():
    code = (
        "import sys\n"
        "from matplotlib import rcParams\n"
        # Reading `backend` would resolve it, and so load pyplot.
        "now = lambda: {key: rcParams[key] for key in rcParams if key != 'backend'}\n"
        "before = now()\n"
        "from tests.run_factory import make_run\nfrom entropy_monitor import figures\n"
        "figures.overview(make_run()).savefig('/dev/null', format='png')\n"
        "figures.heatmap(make_run())\n"
        "assert now() == before\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_matplotlib_the_extra_is_named():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import entropy_monitor.frames\n"
        "from entropy_monitor.errors import MissingExtraError\n"
        "try:\n    import entropy_monitor.figures\n"
        "except MissingExtraError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "needs matplotlib" in done.stdout
    assert "pip install 'entropy-monitor[plots]'" in done.stdout


def test_entropy_draws_mean_band_and_maximum():
    run = make_run(layers=2, heads=2, steps=4)
    ax = figures.entropy(run)
    assert labels(ax) == ["b.0.attn", "b.1.attn", "maximum, log n"]
    first = line(ax, "b.0.attn")
    assert list(first.get_xdata()) == [0, 10, 20, 30]
    assert first.get_ydata() == pytest.approx([(0.90 + 0.89) / 2 * MAXIMUM] * 4)
    band = next(c for c in ax.collections if isinstance(c, PolyCollection))
    edges = band.get_paths()[0].vertices[:, 1]
    assert (edges.min(), edges.max()) == pytest.approx((0.89 * MAXIMUM, 0.90 * MAXIMUM))
    assert line(ax, "maximum, log n").get_ydata() == pytest.approx([MAXIMUM] * 4)
    assert line(ax, "maximum, log n").get_linestyle() == ":"


def test_layers_that_see_different_numbers_of_keys_have_their_own_maximum():
    run = make_run(layers=2, steps=3)
    run.heads.loc[run.heads["layer"] == "b.1.attn", "max_entropy"] = 1.0
    dotted = [drawn for drawn in figures.entropy(run).lines if drawn.get_linestyle() == ":"]
    assert sorted(float(drawn.get_ydata()[0]) for drawn in dotted) == pytest.approx([1.0, MAXIMUM])


def test_steps_that_were_not_finite_are_crossed():
    ax = figures.entropy(broken_run())
    assert set(line(ax, "not finite").get_xdata()) <= {0, 10, 20, 30, 40, 50}
    assert "not finite" not in labels(figures.entropy(make_run()))


def test_many_layers_are_thinned_and_the_figure_says_so():
    ax = figures.entropy(make_run(layers=200, heads=1, steps=2))
    assert len(labels(ax)) == 9
    assert ax.get_title(loc="right").startswith("8 of 200 layers")


def test_layers_can_be_chosen():
    assert labels(figures.entropy(make_run(), ["b.2.attn"])) == ["b.2.attn", "maximum, log n"]
    with pytest.raises(ConfigurationError, match=r"layer is 'b\.7\.attn'"):
        figures.overview(make_run(), ["b.7.attn"])


def test_overview_has_loss_above_entropy_below_and_alerts_by_severity():
    run = make_run(collapsing=True)
    opened = [("severe", 30), ("severe", 50), ("warning", 50), ("info", 70)]
    alerts = alert_frame([alert(severity=s, opened=o) for s, o in opened])
    above, below = figures.overview(run.but(alerts=alerts)).axes[:2]
    assert (above.get_ylabel(), below.get_ylabel()) == ("loss", "entropy (nats)")
    for ax in (above, below):
        marks = {
            drawn.get_xdata()[0]: drawn.get_color() for drawn in ax.lines if drawn.get_linestyle() == "--"
        }
        assert marks == {
            30: style.SEVERITY_COLOURS["severe"],
            50: style.SEVERITY_COLOURS["severe"],
            70: style.SEVERITY_COLOURS["info"],
        }
    assert "2 severe alerts" in labels(above)
    assert "1 info alert" in labels(above)


def test_overview_without_loss_says_so():
    run = make_run().but(scalars=FakeRun().scalars)
    assert "no loss was recorded" in texts(figures.overview(run).axes[0])


def test_empty_tables_say_so():
    assert "nothing measured yet" in texts(figures.entropy(FakeRun()))
    assert "nothing measured yet" in texts(figures.heatmap(FakeRun()))


def test_sigma_is_logarithmic_and_leaves_out_what_is_not_positive():
    run = make_run(collapsing=True, layers=1, heads=1, steps=4)
    run.heads.loc[1, "sigma_qk"] = 0.0
    ax = figures.sigma(run)
    assert ax.get_yscale() == "log"
    assert line(ax, "b.0.attn").get_ydata() == pytest.approx([1, np.nan, 4, 8], nan_ok=True)
    assert ax.get_ylabel() == "sigma_qk (log)"


def test_sigma_draws_columns_of_the_layers_table():
    ax = figures.sigma(make_run(layers=1, steps=2), column="grad_linf")
    assert line(ax, "b.0.attn").get_ydata() == pytest.approx([0.01, 0.01])


def test_sigma_that_is_not_known_says_so():
    assert "sigma_qk is not known" in texts(figures.sigma(null_run()))


def test_floors_draw_what_is_known_and_name_what_is_not():
    ax = figures.floors(make_run(steps=3), "b.1.attn", 1)
    share = 0.9 - 0.02
    assert "b.1.attn, head 1" in ax.get_title(loc="left")
    assert line(ax, "entropy").get_ydata() == pytest.approx([share * MAXIMUM] * 3)
    assert line(ax, "floor: logits of each row").get_ydata() == pytest.approx([0.8 * share * MAXIMUM] * 3)
    assert "floor: weights and inputs (not known)" in labels(ax)
    assert "B(σ_QK, n), the paper's curve" in labels(ax)


def test_floors_of_a_head_that_is_not_there():
    with pytest.raises(ConfigurationError, match="has no head 5"):
        figures.floors(make_run(), "b.0.attn", 5)


def mesh(ax):
    return next(c for c in ax.collections if isinstance(c, QuadMesh))


def test_heatmap_has_a_row_per_head_in_order_and_a_column_per_step():
    run = make_run(layers=12, heads=2, steps=3)
    shuffled = run.but(heads=run.heads.sample(frac=1.0, random_state=1))
    ax = figures.heatmap(shuffled)
    grid = mesh(ax).get_array()
    expected = [[0.9 - 0.01 * (index + head)] * 3 for index in range(12) for head in range(2)]
    assert np.asarray(grid).reshape(24, 3) == pytest.approx(np.array(expected), abs=1e-6)
    assert [t.get_text() for t in ax.get_yticklabels()] == [f"b.{i}.attn" for i in range(12)]
    assert (mesh(ax).norm.vmin, mesh(ax).norm.vmax) == (0.0, 1.0)


def test_heatmap_steps_are_drawn_to_scale():
    rows = [
        {**make_run(layers=1, heads=1, steps=1).heads.iloc[0].to_dict(), "step": step}
        for step in (0, 10, 100)
    ]
    edges = mesh(figures.heatmap(FakeRun(heads=frame(HEADS, rows)))).get_coordinates()[0, :, 0]
    assert list(edges) == [-5.0, 5.0, 55.0, 145.0]


@pytest.mark.parametrize(
    ("column", "pick"), [("entropy_share", "min"), ("max_logit", "max"), ("entropy", "min")]
)
def test_heatmap_of_many_heads_shows_the_worst_of_each_layer(column, pick):
    run = make_run(layers=40, heads=8, steps=2, collapsing=True)
    ax = figures.heatmap(run, column)
    grid = np.asarray(mesh(ax).get_array()).reshape(40, 2)
    values = run.heads.assign(entropy_share=run.heads["entropy"] / run.heads["max_entropy"])
    wanted = values.groupby(["layer_index", "step"])[column].agg(pick).unstack("step")
    assert grid == pytest.approx(wanted.to_numpy(), rel=1e-6)
    assert "a row per layer" in ax.get_title(loc="right")
    assert len(ax.get_yticks()) <= 24


def test_heatmap_of_a_long_run_takes_every_nth_step():
    ax = figures.heatmap(make_run(layers=1, heads=1, steps=1500))
    assert np.asarray(mesh(ax).get_array()).size == 500
    assert "every 3th measured step" in ax.get_title(loc="right")


def test_heatmap_of_an_unknown_column():
    with pytest.raises(ConfigurationError, match="column is 'loss'"):
        figures.heatmap(make_run(), "loss")


def test_attention_map_is_drawn_as_it_is():
    weights = [[0.9, 0.1], [0.25, 0.75]]
    ax = figures.attention_map(weights)
    draw(ax)
    assert np.asarray(ax.images[0].get_array()) == pytest.approx(np.array(weights))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("key", "query")


@pytest.mark.parametrize("rows", [[[np.nan, np.inf]], [[0.0]], np.ones((3, 2))])
def test_attention_map_takes_any_matrix(rows):
    draw(figures.attention_map(rows))


@pytest.mark.parametrize("rows", [[], [[]], [[1.0], [1.0, 2.0]], [["a"]]])
def test_attention_map_refuses_what_is_no_matrix(rows):
    with pytest.raises(ValueError, match=r"matrix|shape|convert"):
        figures.attention_map(rows)


def test_compare_draws_every_run_in_its_colour():
    runs = [make_run("a"), make_run("b", collapsing=True)]
    loss, share, sigma = figures.compare(runs).axes
    assert labels(loss) == ["a", "b"]
    assert line(share, "a").get_color() != line(share, "b").get_color()
    heads = runs[1].heads
    oracle = (heads["entropy"] / heads["max_entropy"]).groupby(heads["step"]).mean()
    assert line(share, "b").get_ydata() == pytest.approx(oracle.to_numpy(), rel=1e-6)
    assert sigma.lines[1].get_ydata() == pytest.approx(2.0 ** np.arange(12))


def test_compare_of_more_runs_than_colours_varies_the_dashes():
    _, share, _ = figures.compare([make_run(f"r{i}", steps=2) for i in range(15)]).axes
    looks = {
        (str(drawn.get_color()), str(drawn._unscaled_dash_pattern))
        for drawn in share.lines
        if not drawn.get_label().startswith("_")
    }
    assert len(looks) == 15


def test_compare_of_nothing():
    with pytest.raises(ConfigurationError, match="runs is empty"):
        figures.compare([])


def test_long_names_are_cut_in_front_unless_that_makes_them_alike():
    long = [f"model.transformer.encoder.layers.{i}.self_attention" for i in (0, 1)]
    cut = style.short(long)
    assert all(len(name) == style.LONGEST_NAME for name in cut)
    assert cut[0].endswith(".0.self_attention")
    alike = [f"{side}.transformer.encoder.layers.0.self_attention" for side in ("left", "right")]
    assert style.short(alike) == alike


def test_rendering_needs_no_display():
    assert mpl.__name__ == "matplotlib"
    figure = draw(figures.overview(make_run()))
    assert type(figure.canvas).__name__.startswith("FigureCanvas")
