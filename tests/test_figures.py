from __future__ import annotations

import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection, QuadMesh
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from entropy_monitor import Run, figures
from entropy_monitor.errors import ConfigurationError
from entropy_monitor.figures import style
from entropy_monitor.records import HEADS
from tests.run_factory import MAXIMUM, FakeRun, alert, alert_frame, frame, make_run

AXES_FIGURES = {
    "entropy": figures.entropy,
    "entropy_against_floor": figures.entropy_against_floor,
    "floors": figures.floors,
    "gradient": figures.gradient,
    "heads_map": figures.heads_map,
    "heatmap": figures.heatmap,
    "loss": figures.loss,
    "sigma": figures.sigma,
    "spectral_growth": figures.spectral_growth,
}
WHOLE_FIGURES = {
    "compare": (figures.compare, 3),
    "overview": (figures.overview, 2),
    "paper_figure_1": (figures.paper_figure_1, 2),
    "paper_figure_2": (figures.paper_figure_2, 3),
    "paper_figure_3": (figures.paper_figure_3, 4),
    "sweep": (lambda run, **kw: figures.sweep(run, [1e-3], **kw), 2),
}
OF_MAPS = {"alert_map", "attention_map"}
ACROSS_STEPS = AXES_FIGURES.keys() - {"entropy_against_floor", "heads_map"}


def draw(made):
    """Renders to pixels: text that cannot be parsed and empty scales fail here, not before."""
    figure = made if isinstance(made, Figure) else made.figure
    figure.set_layout_engine("none")  # arranging draws everything twice
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
    assert (ax.get_xlabel() == "training step") == (name in ACROSS_STEPS)
    assert ax.get_xlabel()
    assert ax.get_ylabel()
    assert ax.get_title(loc="left")


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
def test_the_overview_draws_any_run(run):
    draw(figures.overview(run))


@pytest.mark.parametrize("name", WHOLE_FIGURES.keys() - {"overview"})
def test_figures_of_several_runs_draw_any_runs(name):
    make = WHOLE_FIGURES[name][0]
    draw(figures.sweep(RUNS.values(), range(1, 10)) if name == "sweep" else make(RUNS.values()))
    for run in RUNS.values():
        make(run)
    draw(make(RUNS["empty"]))


def test_every_figure_is_tested_here_and_reached_from_a_run():
    made = {name for name in figures.__all__ if name.islower()} - {"new_figure"}
    assert made == AXES_FIGURES.keys() | WHOLE_FIGURES.keys() | OF_MAPS
    for name in made - {"attention_map", "sweep"}:
        assert callable(getattr(Run, f"plot_{name}")), name


@pytest.mark.parametrize("name", AXES_FIGURES)
def test_given_axes_are_drawn_on_and_returned(name):
    ax = Figure().subplots()
    assert AXES_FIGURES[name](make_run(), ax=ax) is ax


@pytest.mark.parametrize("name", WHOLE_FIGURES)
def test_given_figures_and_axes_are_drawn_on(name):
    make, panels = WHOLE_FIGURES[name]
    figure = Figure()
    assert make(make_run(), figure=figure) is figure
    assert len(figure.axes) == panels
    figure = Figure()
    axes = figure.subplots(panels, 1)
    assert make(make_run(), axes=axes) is figure
    assert figure.axes == list(axes)
    assert all(ax.lines for ax in axes)
    half = Figure(layout="constrained").subfigures(1, 2)[0]
    draw(make(make_run(), figure=half))
    assert len(half.axes) == panels


def test_axes_of_the_wrong_number_are_refused():
    with pytest.raises(ConfigurationError, match=r"axes holds 2 axes; this figure has 3 panels"):
        figures.compare(make_run(), axes=Figure().subplots(2, 1))
    with pytest.raises(ConfigurationError, match="give one of them"):
        figures.compare(make_run(), axes=Figure().subplots(3, 1), figure=Figure())


def test_notebooks_show_what_pyplot_does_not_know_of():
    ax, figure = figures.entropy(make_run()), figures.overview(make_run())
    for shown in (ax, figure):
        assert shown._repr_png_().startswith(b"\x89PNG")
    given = Figure().subplots()
    assert not hasattr(figures.entropy(make_run(), ax=given), "_repr_png_")


@pytest.mark.parametrize("width", [figures.SINGLE_COLUMN, figures.DOUBLE_COLUMN])
@pytest.mark.parametrize("name", AXES_FIGURES)
def test_nothing_lies_outside_a_figure_of_a_column_s_width(name, width):
    figure = figures.new_figure(width, 3.0)
    AXES_FIGURES[name](make_run("a name that is long enough to need lines", layers=12), ax=figure.subplots())
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    box = figure.get_tightbbox(canvas.get_renderer())
    assert (box.x0, box.y0) >= (-0.02, -0.02)
    assert (box.x1, box.y1) <= (width + 0.02, 3.02)
    sizes = [t.get_fontsize() for t in figure.findobj(Text) if t.get_text() and t.get_visible()]
    assert min(sizes) >= 6.5


def test_pyplot_and_rcparams_are_left_alone():
    code = (
        "import sys\n"
        "from matplotlib import rcParams\n"
        # Reading `backend` would resolve it, and so load pyplot.
        "now = lambda: {key: rcParams[key] for key in rcParams if key != 'backend'}\n"
        "before = now()\n"
        "from tests.run_factory import make_run\nfrom entropy_monitor import figures\n"
        "figures.overview(make_run()).savefig('/dev/null', format='png')\n"
        "figures.paper_figure_1(make_run()), figures.heatmap(make_run()), figures.heads_map(make_run())\n"
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
    assert "8 of 200 layers" in texts(ax)


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
    assert ax.get_ylabel() == "σ_QK = ‖W_K W_Qᵀ‖₂"


def test_sigma_draws_columns_of_the_layers_table():
    ax = figures.sigma(make_run(layers=1, steps=2), column="grad_linf")
    assert line(ax, "b.0.attn").get_ydata() == pytest.approx([0.01, 0.01])


def test_sigma_that_is_not_known_says_so():
    assert "σ_QK is not known" in texts(figures.sigma(null_run()))


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
    assert "a row per layer" in texts(ax)
    assert len(ax.get_yticks()) <= 24


def test_heatmap_of_a_long_run_takes_every_nth_step():
    ax = figures.heatmap(make_run(layers=1, heads=1, steps=1500))
    assert np.asarray(mesh(ax).get_array()).size == 500
    assert "1 of 3 measured steps" in texts(ax)


def test_heatmap_of_an_unknown_column():
    with pytest.raises(ConfigurationError, match="column is 'loss'"):
        figures.heatmap(make_run(), "loss")


def written(ax):
    """The numbers in the cells of a map of heads, by (layer, head)."""
    places = [tick.get_text() for tick in ax.get_yticklabels()]
    return {
        (places[int(text.get_position()[1])], int(text.get_position()[0])): float(text.get_text())
        for text in ax.texts
    }


def test_heads_map_is_layers_by_heads_at_a_step():
    run = make_run(collapsing=True)
    shown = {step: written(figures.heads_map(run, step=step)) for step in (0, 25, None)}
    for step, share in ((0, 1.0), (25, 0.25)):
        assert shown[step]["b.0.attn", 1] == pytest.approx(0.89 * share, abs=0.006)
    assert shown[None]["b.2.attn", 0] == pytest.approx(0.88 * 0.5 ** (11 / 3), abs=0.006)
    assert len(shown[0]) == 6
    assert "at step 20" in figures.heads_map(run, step=25).get_title(loc="left").replace("\n", " ")


def test_heads_map_of_a_norm_shows_the_last_step_at_which_it_is_known():
    run = make_run(collapsing=True, steps=6)
    run.heads.loc[run.heads["step"] == 50, "sigma_qk"] = np.nan
    assert set(written(figures.heads_map(run, "sigma_qk")).values()) == {16.0}


def test_heads_map_of_attention_that_is_not_finite_says_so():
    run = make_run(steps=3)
    run.heads.loc[run.heads["step"] == 20, "entropy"] = np.nan
    ax = figures.heads_map(run)
    assert "at step 20" in ax.get_title(loc="left")
    assert texts(ax) == "entropy / maximum is not finite"


def test_heads_map_frames_the_heads_of_alerts_that_are_open():
    alerts = [
        alert(opened=30, closed=60, heads=[0]),
        alert(opened=30, heads=[1], severity="warning"),
        alert(opened=50, heads=[1, 99]),
        alert(opened=30, layer="not there"),
    ]
    run = make_run().but(alerts=alert_frame(alerts))
    framed = {}
    for step in (20, 30, 50, 60):
        ax = figures.heads_map(run, step=step)
        frames = [p for p in ax.patches if isinstance(p, Rectangle)]
        framed[step] = {round(p.get_x() + 0.46): p.get_edgecolor() for p in frames}
        assert {round(p.get_y() + 0.44) for p in frames} <= {0}
    severe, warning = (mpl.colors.to_rgba(style.SEVERITY_COLOURS[s]) for s in ("severe", "warning"))
    assert framed == {20: {}, 30: {0: severe, 1: warning}, 50: {0: severe, 1: severe}, 60: {1: severe}}


def test_heads_map_of_layers_with_other_numbers_of_heads_and_calls():
    run = make_run(layers=2, heads=3, steps=1)
    heads = run.heads[(run.heads["layer"] != "b.1.attn") | (run.heads["head"] < 2)]
    again = heads[heads["layer"] == "b.1.attn"].assign(call=1)
    ax = figures.heads_map(run.but(heads=pd.concat([heads, again])))
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["b.0.attn", "b.1.attn", "b.1.attn, call 1"]
    assert np.ma.getmaskarray(mesh(ax).get_array()).reshape(3, 3).sum() == 2


@pytest.mark.parametrize("make", [figures.heads_map, figures.entropy_against_floor])
def test_maps_and_points_take_a_table_of_one_look(make):
    ax = make(make_run(steps=1).heads)
    assert "step" not in ax.get_title(loc="left")
    assert not ax.get_title(loc="left").startswith(":")
    draw(make(FakeRun().heads))


def test_heads_map_of_what_it_cannot_show():
    with pytest.raises(ConfigurationError, match="column is 'grad_linf'"):
        figures.heads_map(make_run(), "grad_linf")
    late = make_run().but(heads=make_run().heads.query("step >= 50"))
    with pytest.raises(ConfigurationError, match=r"step is 20; .* first read at step 50"):
        figures.heads_map(late, step=20)


def test_points_over_their_floor():
    run = make_run(collapsing=True, layers=2)
    ax = figures.entropy_against_floor(run, step=10)
    drawn = np.concatenate([np.asarray(c.get_offsets()) for c in ax.collections])
    rows = run.heads[run.heads["step"] == 10]
    assert drawn == pytest.approx(rows[["floor_row", "entropy"]].to_numpy())
    bound = line(ax, "entropy = floor")
    assert list(bound.get_xdata()) == list(bound.get_ydata())
    assert labels(ax) == ["entropy = floor", "maximum, log n", "b.0.attn", "b.1.attn"]
    assert "weight floor is not known" in texts(figures.entropy_against_floor(run, "floor_weights"))
    with pytest.raises(ConfigurationError, match="floor is 'sigma_qk'"):
        figures.entropy_against_floor(run, "sigma_qk")


def test_growth_is_that_of_each_head_since_it_was_first_read():
    run = make_run(collapsing=True, layers=1, heads=2, steps=4)
    heads = run.heads
    heads.loc[heads["head"] == 1, "sigma_qk"] = [np.nan, 3.0, 0.0, 30.0]
    ax = figures.spectral_growth(run)
    drawn = line(ax, "b.0.attn")
    assert drawn.get_ydata() == pytest.approx([1.0, (2 + 1) / 2, 4.0, (8 + 10) / 2])
    assert ax.get_yscale() == "log"
    assert ax.get_ylabel() == "σ_QK / first value"


def test_norms_of_many_layers_show_the_highest():
    run = make_run(layers=48, heads=1, steps=2)
    run.heads.loc[run.heads["layer"] == "b.30.attn", "sigma_qk"] = 50.0
    for make in (figures.sigma, figures.spectral_growth):
        ax = make(run)
        assert "8 of 48 layers" in texts(ax)
    assert "b.30.attn" in labels(figures.sigma(run))


def test_floors_without_a_head_are_those_of_the_lowest():
    run = make_run(collapsing=True)
    assert "b.0.attn, head 1" in figures.floors(run).get_title(loc="left")
    assert "b.2.attn, head 1" in figures.floors(run, "b.2.attn").get_title(loc="left")
    with pytest.raises(ConfigurationError, match="say of which layer"):
        figures.floors(run, head=1)


def test_the_map_of_an_alert_says_whose_it_is():
    run = make_run(collapsing=True)
    ax = figures.alert_map(run)
    assert np.asarray(ax.images[0].get_array()) == pytest.approx(np.array([[0.9, 0.1], [0.2, 0.8]]))
    assert ax.get_title(loc="left") == "b.0.attn, head 1"
    with pytest.raises(ConfigurationError, match="alert is 1; run 'sound' has 1 alerts"):
        figures.alert_map(run, 1)
    bare = run.but(alerts=alert_frame([alert(evidence={"entropy": 0.1})]))
    with pytest.raises(ConfigurationError, match="no attention map was stored"):
        figures.alert_map(bare)


def test_a_long_line_keeps_its_extremes():
    run = make_run(layers=1, heads=1, steps=6000)
    run.heads.loc[3333, "entropy"] = 0.001
    drawn = line(figures.entropy(run), "b.0.attn")
    assert len(drawn.get_xdata()) <= 1300
    assert drawn.get_ydata().min() == pytest.approx(0.001)
    assert drawn.get_xdata()[[0, -1]].tolist() == [0, 59990]


def test_attention_map_is_drawn_as_it_is():
    weights = [[0.9, 0.1], [0.25, 0.75]]
    ax = figures.attention_map(weights)
    draw(ax)
    assert np.asarray(ax.images[0].get_array()) == pytest.approx(np.array(weights))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("key", "query")
    assert figures.attention_map(weights, title="layer $1").get_title(loc="left") == r"layer \$1"


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
    assert cut == ["…layers.0.self_attention", "…layers.1.self_attention"]
    assert all(len(name) <= style.LONGEST_NAME for name in style.short(["x" * 100, "a." + "y" * 100]))
    alike = [f"{side}.transformer.encoder.layers.0.self_attention" for side in ("left", "right")]
    assert style.short(alike) == alike


def test_rendering_needs_no_display():
    assert mpl.__name__ == "matplotlib"
    figure = draw(figures.overview(make_run()))
    assert type(figure.canvas).__name__.startswith("FigureCanvas")
