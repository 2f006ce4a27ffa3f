from __future__ import annotations

import inspect
from pathlib import Path

import pandas as pd
import pytest

from entropy_monitor.errors import RunDirectoryError
from entropy_monitor.plots import Plots
from entropy_monitor.run import Run, load_run
from tests.store.samples import MODEL, NAMES, event, info, record, write_run


def test_the_tables_are_frames(tmp_path: Path) -> None:
    write_run(tmp_path / "a", (0, 10), events=(event(10),)).close()
    run = load_run(tmp_path / "a")
    assert run.heads["step"].tolist() == [0] * 4 + [10] * 4
    assert run.layers["layer"].tolist() == [*NAMES, *NAMES]
    assert run.scalars["name"].tolist() == ["loss", "loss"]
    assert run.alerts["id"].tolist() == ["a"]
    assert run.heads is run.heads
    assert run.info["model"] == MODEL
    assert (run.plan, run.problems) == ({}, [])
    assert (run.name, run.path) == ("a", tmp_path / "a")
    assert [session.number for session in run.sessions] == [0]


def test_the_loss_is_a_series_by_step(tmp_path: Path) -> None:
    write_run(tmp_path, (0, 10))
    loss = load_run(tmp_path).loss
    pd.testing.assert_series_equal(
        loss, pd.Series([1.0, 1 / 11], index=pd.Index([0, 10], name="step"), name="loss")
    )


def test_layers_come_in_the_order_of_execution(tmp_path: Path) -> None:
    writer = write_run(tmp_path, (), close=False)
    writer.log(record(0, layers=("block.10", "block.9", "a")))
    writer.close()
    assert load_run(tmp_path).layer_names == ["block.10", "block.9", "a"]


def test_refresh_reads_what_was_added(tmp_path: Path) -> None:
    writer = write_run(tmp_path, (0,), close=False)
    run = load_run(tmp_path)
    frames = (run.heads, run.layers, run.scalars, run.alerts, run.loss)
    assert [len(frame) for frame in frames] == [4, 2, 1, 0, 1]
    writer.log(record(1))
    writer.alert(event(1))
    assert len(run.heads) == 4
    assert run.refresh() is run
    frames = (run.heads, run.layers, run.scalars, run.alerts, run.loss)
    assert [len(frame) for frame in frames] == [8, 4, 2, 1, 2]
    writer.close()


def test_its_repr_is_one_line(tmp_path: Path) -> None:
    write_run(tmp_path / "a", (0, 10), events=(event(0), event(10, "closed", opened=0), event(10, id_="b")))
    assert repr(load_run(tmp_path / "a")) == (
        "<Run 'a': Tiny, steps 0 to 10, 2 layers, 8 head rows, 2 alerts (1 open), 1 session>"
    )
    (tmp_path / "a" / "run.json").write_text("")
    write_run(tmp_path / "b", ())
    assert repr(load_run(tmp_path / "a")).startswith("<Run 'a': unknown model, steps 0 to 10,")
    assert repr(load_run(tmp_path / "a")).endswith("1 session, 1 problem>")
    assert repr(load_run(tmp_path / "b")) == (
        "<Run 'b': Tiny, no steps yet, 0 layers, 0 head rows, 0 alerts (0 open), 1 session>"
    )


def test_what_is_no_run_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(
        RunDirectoryError, match=f"{tmp_path} holds no run; expected a directory with a run.json"
    ):
        load_run(tmp_path)


PLOTS = [name.removeprefix("plot_") for name in vars(Plots) if name.startswith("plot_")]


@pytest.mark.parametrize("name", PLOTS)
def test_plots_take_what_their_figures_take(name: str) -> None:
    figures = pytest.importorskip("entropy_monitor.figures")
    _, *method = inspect.signature(getattr(Run, f"plot_{name}")).parameters.values()
    _, *function = inspect.signature(getattr(figures, name)).parameters.values()
    if method[0].kind is inspect.Parameter.VAR_POSITIONAL:  # further runs: what follows goes by its name
        method = method[1:]
        function = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in function]
    assert [(p.name, p.kind, p.default) for p in method] == [(p.name, p.kind, p.default) for p in function]


def test_plots_draw(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    writer = write_run(tmp_path, (0, 10, 20), close=False)
    writer.describe(info().plan)
    writer.close()
    run = load_run(tmp_path)
    assert run.plot_overview().axes
    assert len(run.plot_compare(run).axes) == 3
    assert len(run.plot_paper_figure_1(run).axes) == 4
    assert len(run.plot_paper_figure_3(run, run, groups=["a", "a", "b"]).axes) == 4
    for ax in (
        run.plot_entropy(),
        run.plot_sigma(column="sigma_q"),
        run.plot_floors(NAMES[0], 1),
        run.plot_heatmap(),
        run.plot_heads_map(),
        run.plot_gradient(),
    ):
        assert ax.has_data()
