"""The paper's figures, and several runs on common axes: which numbers they show."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from entropy_monitor import figures
from entropy_monitor.errors import ConfigurationError
from entropy_monitor.figures import style
from tests.run_factory import MAXIMUM, FakeRun, alert, alert_frame, make_run, read_seldom
from tests.test_figures import draw, labels, line, texts


def with_scalar(run: FakeRun, name: str, values) -> FakeRun:
    rows = run.scalars.iloc[: len(values)].assign(name=name, value=values)
    return run.but(scalars=rows.reset_index(drop=True))


def look(drawn):
    return drawn.get_color(), drawn._unscaled_dash_pattern


def test_figure_1_has_a_column_for_each_run_on_common_axes():
    sound, bad = make_run("sound", layers=5), make_run("bad", layers=5, collapsing=True)
    figure = figures.paper_figure_1([sound, bad])
    above, above_bad, below, below_bad = figure.axes
    assert [ax.get_title(loc="left") for ax in (above, above_bad)] == ["sound", "bad"]
    assert (above.get_ylabel(), below.get_ylabel()) == ("loss", "entropy (nats)")
    assert line(above, "loss, mean of 3").get_ydata()[60] == pytest.approx(2 * 0.99**60, rel=0.01)
    drawn = [drawn.get_label() for drawn in below.lines]
    assert drawn == ["b.0.attn", "b.2.attn", "b.4.attn", "maximum, log n"]
    expected = [(0.90 + 0.89) / 2 * MAXIMUM * 0.5**t for t in range(12)]
    assert line(below_bad, "b.0.attn").get_ydata() == pytest.approx(expected)
    assert below.get_ylim() == below_bad.get_ylim()
    assert above.get_ylim() == above_bad.get_ylim()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == drawn
    draw(figure)


def test_figure_1_of_many_runs_goes_on_below():
    figure = figures.paper_figure_1([make_run(f"r{i}", steps=2) for i in range(6)])
    assert [ax.get_title(loc="left") for ax in figure.axes if ax.get_title(loc="left")] == [
        f"r{i}" for i in range(6)
    ]
    assert len(figure.axes) == 12
    assert len(draw(figure).axes) == 12


def test_figure_1_of_runs_with_other_layers_has_a_legend_each():
    other = make_run("other", layers=2)
    other.heads["layer"] = other.heads["layer"].str.replace("b.", "c.", regex=False)
    figure = figures.paper_figure_1([make_run(layers=2), other])
    assert not figure.legends
    assert [labels(ax)[:2] for ax in figure.axes[2:]] == [["b.0.attn", "b.1.attn"], ["c.0.attn", "c.1.attn"]]
    figure = figures.paper_figure_1([make_run(layers=2), other], ["c.1.attn"])
    assert [drawn.get_label() for drawn in figure.axes[3].lines][:1] == ["c.1.attn"]
    with pytest.raises(ConfigurationError, match=r"layer is 'd'"):
        figures.paper_figure_1([make_run(), other], ["c.1.attn", "d"])


def test_figure_1_on_given_axes_takes_two_a_run():
    axes = Figure().subplots(2, 2)
    figures.paper_figure_1([make_run("a"), make_run("b")], axes=axes)
    assert axes[0, 0].get_title(loc="left") == "a"
    assert axes[0, 1].get_ylabel() == "entropy (nats)"
    assert axes[1, 0].get_title(loc="left") == "b"


def test_figure_2_shows_the_whole_model():
    runs = [make_run("a"), make_run("b", collapsing=True)]
    metric, entropy, sigma = figures.paper_figure_2(runs).axes
    assert labels(metric) == ["a", "b"]
    oracle = runs[1].heads.groupby("step")["entropy"].mean()
    assert line(entropy, "b").get_ydata() == pytest.approx(oracle.to_numpy(), rel=1e-6)
    assert line(sigma, "b").get_ydata() == pytest.approx(2.0 ** np.arange(12))
    assert sigma.get_yscale() == "log"


def test_the_metric_of_the_paper_s_figures_can_be_another_scalar():
    run = with_scalar(make_run("a"), "accuracy", [0.1, 0.5, 0.9])
    metric = figures.paper_figure_2(run, metric="accuracy").axes[0]
    assert metric.get_ylabel() == "accuracy"
    assert line(metric, "a").get_ydata() == pytest.approx([0.1, 0.5, 0.9])
    assert "no accuracy was recorded" in texts(figures.paper_figure_3(make_run(), metric="accuracy").axes[0])


def test_figure_3_shows_one_layer():
    run = make_run("bad", collapsing=True)
    run.layers.loc[run.layers["layer"] == "b.2.attn", "grad_linf"] = 7.0
    for layer, place in ((None, 0), ("b.2.attn", 2), (-1, 2), (1, 1)):
        _, entropy, sigma, gradient = figures.paper_figure_3(run, layer).axes
        share = 0.9 - 0.01 * (place + 0.5)
        expected = [share * MAXIMUM * 0.5 ** (t / (1 + place)) for t in range(12)]
        assert line(entropy, "bad").get_ydata() == pytest.approx(expected, rel=1e-5)
        assert line(sigma, "bad").get_ydata() == pytest.approx(2.0 ** np.arange(12))
        assert gradient.lines[0].get_ydata()[0] == pytest.approx(7.0 if place == 2 else 0.01)
        assert f"b.{place}.attn" in entropy.get_title(loc="left").replace("\n", " ")


def test_figure_3_joins_the_steps_at_which_norms_are_known():
    parts = figures.paper_figure_3(read_seldom(make_run(collapsing=True))).axes
    assert list(parts[1].lines[0].get_xdata()) == list(range(0, 120, 10))
    for norm in parts[2:]:
        assert list(norm.lines[0].get_xdata()) == [0, 40, 80]


@pytest.mark.parametrize(("layer", "said"), [(3, "layers 0 to 2"), ("b.9.attn", "has 'b.0.attn'")])
def test_figure_3_of_a_layer_that_is_not_there(layer, said):
    with pytest.raises(ConfigurationError, match=said):
        figures.paper_figure_3(make_run(), layer)


def test_runs_of_one_method_share_a_colour():
    runs = [make_run(name) for name in ("a", "b", "c")]
    entropy = figures.paper_figure_2(runs, groups=["x", "x", "y"]).axes[1]
    (one, two, three) = entropy.lines
    assert one.get_color() == two.get_color() != three.get_color()
    assert look(one) != look(two)
    assert one.get_linestyle() == three.get_linestyle() == "-"
    assert [drawn.get_label() for drawn in entropy.lines] == ["x: a", "x: b", "y: c"]
    with pytest.raises(ConfigurationError, match="2 groups for 3 runs"):
        figures.paper_figure_3(runs, groups=["x", "y"])


def test_the_loss_of_several_runs_has_a_line_each():
    ax = figures.loss([make_run("a"), make_run("b")])
    assert labels(ax) == ["a", "b"]
    assert ax.get_title(loc="left") == "loss"
    with pytest.raises(ConfigurationError, match="runs is empty"):
        figures.loss([])
    assert labels(figures.loss(make_run(name) for name in "ab")) == ["a", "b"]


def test_a_sweep_shows_how_runs_ended():
    sound, bad = make_run("sound"), make_run("bad", collapsing=True)
    broken = with_scalar(make_run("broken"), "loss", [1.0, np.nan])
    loss, share = figures.sweep([bad, sound, broken], [1e-1, 1e-3, 1.0], name="learning rate").axes
    assert share.get_xlabel() == "learning rate"
    assert share.get_xscale() == "log"
    points = {float(drawn.get_xdata()[0]): drawn for drawn in loss.lines if len(drawn.get_xdata()) == 1}
    assert points[1e-3].get_ydata()[0] == pytest.approx(np.mean([2 * 0.99**t for t in range(110, 120)]))
    assert points[1e-3].get_marker() == "o"
    assert points[1e-1].get_marker() == "X"  # a severe alert
    assert points[1.0].get_transform() == loss.get_xaxis_transform()  # no number to stand at
    last = bad.heads[bad.heads["step"] == 110]
    left = (last["entropy"] / last["max_entropy"]).to_numpy()
    bars = {drawn.get_xdata()[0]: drawn for drawn in share.lines if len(set(drawn.get_xdata())) == 1}
    at_end = {len(d.get_xdata()): d.get_ydata() for d in share.lines if list(d.get_xdata())[:1] == [1e-1]}
    assert bars
    assert at_end[2] == pytest.approx([left.min(), left.max()])
    assert at_end[1] == pytest.approx([left.mean()])


def test_a_sweep_finds_the_value_among_the_scalars():
    runs = [with_scalar(make_run(f"{i}"), "lr", [0.0, 0.1 * i, 0.05]) for i in (1, 2)]
    _, share = figures.sweep(runs, "lr", metric="lr").axes
    assert share.get_xlabel() == "lr"
    assert [tick.get_text() for tick in share.get_xticklabels()] == ["0.1", "0.2"]
    with pytest.raises(ConfigurationError, match=r"run 'sound' recorded no scalar 'lr'"):
        figures.sweep([make_run()], "lr")


def test_a_sweep_over_two_choices_has_a_line_for_each():
    runs = [make_run(str(i)) for i in range(4)]
    figure = figures.sweep(runs, [1, 2, 1, 2], groups=["no warmup", "no warmup", "warmup", "warmup"])
    assert labels(figure.axes[0]) == ["no warmup", "warmup", "no severe alert", "a severe alert opened"]
    with pytest.raises(ConfigurationError, match="values holds 1 numbers for 4 runs"):
        figures.sweep(runs, [1.0])
    with pytest.raises(ConfigurationError, match="groups names 1 groups for 4 runs"):
        figures.sweep(runs, [1, 2, 3, 4], groups=["a"])


def test_a_severe_alert_that_has_closed_still_counts_in_a_sweep():
    closed = make_run().but(alerts=alert_frame([alert(closed=50)]))
    mild = make_run().but(alerts=alert_frame([alert(severity="warning")]))
    loss = figures.sweep([closed, mild], [1.0, 2.0]).axes[0]
    marks = {float(d.get_xdata()[0]): d.get_marker() for d in loss.lines if len(d.get_xdata()) == 1}
    assert marks == {1.0: "X", 2.0: "o"}


def test_colours_are_those_that_colour_blind_readers_can_tell_apart():
    drawn = figures.compare([make_run(f"r{i}") for i in range(7)]).axes[1].lines
    assert {line.get_color() for line in drawn} == set(style.OKABE_ITO)
