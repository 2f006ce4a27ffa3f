from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from entropy_monitor import frames
from entropy_monitor.errors import ConfigurationError
from tests.run_factory import FakeRun, make_run


def test_share_is_entropy_over_maximum_and_null_for_one_key():
    heads = make_run(layers=1, heads=1, steps=3).heads
    heads.loc[1, "max_entropy"] = 0.0
    heads.loc[2, "entropy"] = np.inf
    share = frames.with_share(heads)[frames.SHARE]
    assert share[0] == pytest.approx(0.9, abs=1e-6)
    assert share[1:].isna().all()


def test_layers_come_in_order_of_execution_not_of_name():
    heads = make_run(layers=11, steps=1).heads.sample(frac=1.0, random_state=0)
    assert frames.layer_names(heads) == [f"b.{i}.attn" for i in range(11)]
    assert frames.layer_names(FakeRun().heads) == []


@pytest.mark.parametrize("layers", [1, 8])
def test_few_layers_are_all_chosen(layers):
    table = frames.column_of(make_run(layers=layers, steps=2), "entropy")
    chosen, remark = frames.choose_layers(table, None)
    assert len(chosen) == layers
    assert remark == ""


def test_many_layers_are_thinned_evenly_and_the_lowest_is_kept():
    table = frames.column_of(make_run(layers=100, steps=2), "entropy")
    table.loc[table["layer"] == "b.41.attn", "value"] = 0.001
    chosen, remark = frames.choose_layers(table, None)
    indices = [int(name.split(".")[1]) for name in chosen]
    assert len(indices) == frames.MOST_LAYERS
    assert indices == sorted(indices)
    assert {0, 41, 99} <= set(indices)
    assert max(np.diff(indices)) <= 18
    assert remark == "8 of 100 layers, evenly spaced, and the one with the lowest value"


def test_a_layer_that_is_not_there_is_named_with_those_that_are():
    table = frames.column_of(make_run(layers=9, steps=1), "entropy")
    with pytest.raises(ConfigurationError, match=r"'b\.9\.attn'; this run has 'b\.0.*and 3 more"):
        frames.choose_layers(table, ["b.9.attn"])


def test_one_layer_may_be_given_as_text():
    table = frames.column_of(make_run(steps=1), "entropy")
    assert frames.choose_layers(table, "b.1.attn")[0] == ["b.1.attn"]


def test_curves_are_mean_min_and_max_over_heads():
    heads = make_run(layers=2, heads=3, steps=4, collapsing=True)
    table = frames.column_of(heads, "entropy")
    lines = frames.curves(table, ["b.1.attn", "b.0.attn"])
    assert list(lines) == ["b.1.attn", "b.0.attn"]
    for name, line in lines.items():
        for step, row in line.iterrows():
            of = [
                float(v)
                for s, n, v in zip(table["step"], table["layer"], table["value"], strict=True)
                if s == step and n == name
            ]
            assert row["mean"] == pytest.approx(sum(of) / 3)
            assert (row["min"], row["max"]) == (min(of), max(of))


def test_curves_leave_out_what_is_not_finite():
    run = make_run(layers=1, heads=2, steps=2)
    run.heads.loc[[0, 2, 3], "entropy"] = [np.inf, np.nan, -np.inf]
    line = frames.curves(frames.column_of(run, "entropy"), ["b.0.attn"])["b.0.attn"]
    assert line.loc[0, "mean"] == pytest.approx(float(run.heads["entropy"][1]))
    assert line.loc[10].isna().all()
    assert frames.broken_steps(run.heads, "entropy") == [0, 10]


def test_columns_are_found_in_both_tables():
    run = make_run(steps=1)
    assert len(frames.column_of(run, "sigma_q")) == len(run.heads)
    assert len(frames.column_of(run, "sigma_v")) == len(run.layers)


@pytest.mark.parametrize("column", ["step", "layer", "attention", "sigma", ""])
def test_an_unknown_column_is_refused_with_the_choice(column):
    with pytest.raises(ConfigurationError, match=rf"column is '{column}'.*entropy_share.*grad_l2"):
        frames.column_of(make_run(steps=1), column)


@pytest.mark.parametrize(
    ("layer", "head", "call", "text"),
    [
        ("nowhere", 0, 0, "layer is 'nowhere'; this run has 'b.0.attn'"),
        ("b.0.attn", 7, 0, "no head 7 in call 0; it has heads 0 to 1 in calls 0"),
        ("b.0.attn", 0, 1, "no head 0 in call 1"),
    ],
)
def test_a_head_that_is_not_there_is_named_with_those_that_are(layer, head, call, text):
    with pytest.raises(ConfigurationError) as caught:
        frames.head_series(make_run(steps=1).heads, layer, head, call)
    assert text in str(caught.value)


def test_scalar_keeps_the_last_of_a_repeated_step():
    scalars = pd.DataFrame(
        {"step": [2, 1, 2, 1], "name": ["loss", "loss", "loss", "lr"], "value": [9.0, 1.0, 2.0, 7.0]}
    )
    run = FakeRun(scalars=scalars)
    assert frames.scalar(run).to_dict() == {1: 1.0, 2: 2.0}
    assert frames.scalar(run, "nothing").empty


def test_smoothing_is_a_centred_mean_that_keeps_gaps():
    values = pd.Series(np.random.default_rng(0).normal(size=300))
    values[150] = np.nan
    mean, window = frames.smooth(values)
    assert window == 7
    assert mean[50] == pytest.approx(float(values.loc[47:53].mean()))
    assert np.isnan(mean[150])
    short, window = frames.smooth(values[:20])
    assert window == 1
    assert short.equals(values[:20])


def test_the_layer_with_the_highest_value_is_kept_where_high_is_bad():
    table = frames.column_of(make_run(layers=100, steps=2), "sigma_qk")
    table.loc[table["layer"] == "b.41.attn", "value"] = 9.0
    chosen, remark = frames.choose_layers(table, None, low_is_bad=False)
    assert "b.41.attn" in chosen
    assert remark.endswith("and the one with the highest value")
    three, remark = frames.choose_layers(table, None, most=3)
    assert three == ["b.0.attn", "b.50.attn", "b.99.attn"]
    assert remark == "3 of 100 layers, evenly spaced"


def test_thinned_lines_keep_what_can_be_seen():
    rng = np.random.default_rng(0)
    lines = [pd.Series(rng.normal(size=10_000)) for _ in range(2)]
    lines[0][4000:4100] = np.nan
    places = frames.thinned(*lines, most=400)
    assert (np.diff(places) > 0).all()
    assert len(places) <= 520
    assert places[[0, -1]].tolist() == [0, 9999]
    for line in lines:
        kept = line.iloc[places]
        for start in range(0, 10_000, 100):  # 100 stretches: 400 places, two lines, two ends of each
            stretch, shown = line[start : start + 100], kept.loc[start : start + 99]
            if stretch.notna().any():
                assert (shown.min(), shown.max()) == (stretch.min(), stretch.max())
    assert lines[0].iloc[places].loc[4000:4099].isna().any()


@pytest.mark.parametrize("length", [0, 1, 5])
def test_short_lines_are_kept_whole(length):
    assert frames.thinned(pd.Series(np.full(length, np.nan)), most=5).tolist() == list(range(length))


def test_a_line_of_nothing_that_is_long_is_no_error():
    assert len(frames.thinned(pd.Series(np.full(5000, np.nan)))) >= 2


def test_growth_is_over_the_first_positive_value_in_order_of_steps():
    run = make_run(layers=1, heads=2, steps=4, collapsing=True)
    run.heads["sigma_qk"] = run.heads["sigma_qk"].where(run.heads["head"] == 0, 3 * run.heads["sigma_qk"])
    run.heads.loc[0, "sigma_qk"] = 0.0
    shuffled = run.but(heads=run.heads.sample(frac=1.0, random_state=3))
    grown = frames.growth(frames.column_of(shuffled, "sigma_qk")).sort_index()["value"]
    assert grown.tolist() == pytest.approx([np.nan, 1, 1, 2, 2, 4, 4, 8], nan_ok=True)


def test_the_lowest_head_of_a_run():
    run = make_run(collapsing=True)
    assert frames.lowest_head(run.heads) == ("b.0.attn", 1, 0)
    assert frames.lowest_head(FakeRun().heads) is None
