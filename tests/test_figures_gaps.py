"""Figures of runs in which norms of weights are known in some of the measured steps only."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from entropy_monitor import figures, frames
from tests.run_factory import FakeRun, make_run, read_seldom
from tests.test_figures import draw, labels, line, mesh, texts


def points(drawn) -> dict[int, float]:
    return dict(zip(drawn.get_xdata(), drawn.get_ydata(), strict=True))


def blackened(ax) -> int:
    """Pixels of the lines, which are drawn in black, everything else taken away."""
    for drawn in ax.lines:
        drawn.set_color("black")
    for other in [*ax.texts, *([ax.get_legend()] if ax.get_legend() else [])]:
        other.remove()
    ax.set_axis_off()
    for place in ("left", "right"):
        ax.set_title("", loc=place)
    canvas = FigureCanvasAgg(ax.figure)
    canvas.draw()
    return int((np.asarray(canvas.buffer_rgba())[..., :3].max(axis=-1) < 60).sum())


def only(run: FakeRun, steps) -> FakeRun:
    """The run with σ_QK known at these steps alone."""
    return run.but(
        heads=run.heads.assign(sigma_qk=run.heads["sigma_qk"].where(run.heads["step"].isin(steps)))
    )


def growing(**sizes: int) -> FakeRun:
    return make_run(collapsing=True, **sizes)


@pytest.mark.parametrize("column", ["sigma_qk", "grad_linf"])
def test_a_line_joins_the_steps_at_which_a_norm_is_known(column):
    ax = figures.sigma(read_seldom(growing(layers=1, steps=12)), column=column)
    assert list(points(line(ax, "b.0.attn"))) == [0, 40, 80]
    assert np.isfinite(line(ax, "b.0.attn").get_ydata()).all()
    (band,) = [c for c in ax.collections if len(c.get_paths())]
    assert len(band.get_paths()) == 1


def test_a_line_of_a_layer_under_suspicion_has_all_its_points():
    ax = figures.sigma(read_seldom(growing(layers=2, steps=12), suspects=["b.1.attn"]))
    assert len(points(line(ax, "b.0.attn"))) == 3
    assert len(points(line(ax, "b.1.attn"))) == 12


def test_a_layer_whose_norms_are_never_known_is_named():
    run = growing(layers=2, steps=4)
    run.heads.loc[run.heads["layer"] == "b.1.attn", "sigma_qk"] = np.nan
    ax = figures.sigma(run)
    assert labels(ax) == ["b.0.attn", "b.1.attn (not known)"]
    assert "not known" not in texts(ax)
    assert "σ_QK is not known in this run" in texts(figures.sigma(run, ["b.1.attn"]))


def test_a_norm_that_is_not_finite_is_no_gap_to_be_joined_over():
    run = growing(layers=1, heads=1, steps=3)
    run.heads.loc[1, "sigma_qk"] = np.inf
    assert line(figures.sigma(run), "b.0.attn").get_ydata() == pytest.approx([1, np.nan, 4], nan_ok=True)


def test_floors_are_joined_over_the_steps_at_which_they_are_not_known():
    run = read_seldom(make_run(steps=12))
    ax = figures.floors(run, "b.0.attn", 0)
    assert list(points(line(ax, "floor: norms of q and k"))) == [0, 40, 80]
    assert list(points(line(ax, "B(σ_QK, n), the paper's curve"))) == [0, 40, 80]
    assert len(points(line(ax, "entropy"))) == len(points(line(ax, "floor: logits of each row"))) == 12
    assert "floor: weights and inputs (not known)" in labels(ax)


@pytest.mark.parametrize("steps", [[50], [0, 110]])
def test_few_known_points_are_seen(steps):
    run = growing(layers=1, steps=12)
    assert blackened(figures.sigma(only(run, []))) == 0
    assert blackened(figures.sigma(only(run, steps))) > 10
    compared = figures.compare([only(run, steps)])
    compared.axes[0].remove()
    compared.axes[0].remove()
    assert blackened(compared.axes[0]) > 10


def test_a_point_between_two_that_are_not_finite_is_seen():
    run = make_run(layers=1, heads=1, steps=5)
    run.heads.loc[[1, 3], "entropy"] = np.nan
    drawn = line(figures.entropy(run), "b.0.attn")
    assert (drawn.get_marker(), drawn.get_markevery()) == ("o", [0, 2, 4])
    whole = line(figures.entropy(make_run(layers=1)), "b.0.attn")
    assert whole.get_marker() == "None"


def test_the_largest_norm_is_that_of_all_heads_or_of_none():
    run = growing(layers=2, steps=12)
    run.heads.loc[run.heads["layer"] == "b.1.attn", "sigma_qk"] *= 10
    sparse = read_seldom(run, suspects=["b.0.attn"])
    drawn = figures.compare([sparse]).axes[2].lines[0]
    assert points(drawn) == pytest.approx({0: 10.0, 40: 160.0, 80: 2560.0})


def test_a_head_that_was_never_known_is_not_waited_for():
    run = growing(layers=2, heads=2, steps=6)
    heads = run.heads
    late = (heads["layer"] == "b.1.attn") & (heads["head"] == 1)
    heads.loc[late & (heads["step"] < 20), "sigma_qk"] = np.nan
    heads.loc[late & (heads["step"] == 30), "sigma_qk"] = np.nan
    largest = frames.largest_known(frames.column_of(run, "sigma_qk"))
    assert largest.to_dict() == pytest.approx({0: 1, 10: 2, 20: 4, 40: 16, 50: 32})


def test_a_layer_that_does_not_run_in_a_step_is_not_waited_for():
    run = growing(layers=2, steps=3)
    heads = run.heads
    skipped = run.but(heads=heads[(heads["layer"] == "b.0.attn") | (heads["step"] != 10)])
    largest = frames.largest_known(frames.column_of(skipped, "sigma_qk"))
    assert largest.to_dict() == pytest.approx({0: 1, 10: 2, 20: 4})
    assert frames.largest_known(frames.column_of(FakeRun(), "sigma_qk")).empty


def grid(ax, rows: int) -> np.ndarray:
    return np.ma.filled(np.ma.asarray(mesh(ax).get_array()), np.nan).reshape(rows, -1)


def test_a_heatmap_gives_each_step_the_nearest_known_value():
    ax = figures.heatmap(read_seldom(growing(layers=1, heads=1, steps=10)), "sigma_qk")
    unknown = np.nan
    expected = [[1, 1, 1, 16, 16, 16, 16, 256, 256, unknown]]
    assert grid(ax, 1) == pytest.approx(np.array(expected), nan_ok=True)
    draw(ax)


def test_a_heatmap_of_a_layer_under_suspicion_has_every_reading():
    run = read_seldom(growing(layers=2, heads=1, steps=9), suspects=["b.1.attn"])
    drawn = grid(figures.heatmap(run, "sigma_qk"), 2)
    assert drawn[1] == pytest.approx(2.0 ** np.arange(9))
    assert drawn[0] == pytest.approx([1, 1, 1, 16, 16, 16, 16, 256, 256])


@pytest.mark.parametrize("offset", range(4))
def test_a_heatmap_of_a_long_run_does_not_miss_the_steps_that_are_known(offset):
    run = make_run(layers=1, heads=1, steps=2400)
    heads = run.heads.assign(sigma_qk=1.0 + run.heads["step"])
    sparse = run.but(heads=heads.assign(sigma_qk=heads["sigma_qk"].where(heads["step"] // 10 % 4 == offset)))
    drawn = grid(figures.heatmap(sparse, "sigma_qk"), 1)[0]
    assert len(drawn) == 600
    assert np.isfinite(drawn[1:]).all()
    steps = 10 * np.arange(0, 2400, 4)
    assert np.abs(drawn - 1 - steps)[1:].max() <= 20


def test_a_heatmap_does_not_close_over_what_is_not_finite():
    run = growing(layers=1, heads=1, steps=5)
    run.heads.loc[2, "sigma_qk"] = np.inf
    run.heads.loc[3, "sigma_qk"] = np.nan
    expected = np.array([[1, 2, np.nan, np.nan, 16]])
    assert grid(figures.heatmap(run, "sigma_qk"), 1) == pytest.approx(expected, nan_ok=True)


def test_what_is_known_is_told_from_what_is_finite():
    run = growing(layers=1, heads=1, steps=3)
    run.heads["sigma_qk"] = [1.0, np.inf, np.nan]
    run.heads["entropy"] = [1.0, np.inf, np.nan]
    assert frames.column_of(run, "sigma_qk")["known"].tolist() == [True, True, False]
    assert frames.column_of(run, "entropy")["known"].tolist() == [True] * 3
    assert frames.column_of(run, frames.SHARE)["known"].tolist() == [True] * 3
    assert isinstance(frames.column_of(FakeRun(), "entropy"), pd.DataFrame)
