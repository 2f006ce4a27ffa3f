"""The oracle of `Cubes` and `FollowedRun`: `read_run` reads all anew, and pandas puts it together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from entropy_monitor.records import ABOVE_FLOOR, HEADS, LAYERS, SHARE, Table
from entropy_monitor.store import Cubes, FollowedRun, Place, RunData, read_run

Doubles = npt.NDArray[np.float64]


def figures(table: Table) -> list[str]:
    """What can be asked of a table's cubes: its figures, the weight of its rows, and what is derived."""
    own = [column.name for column in table.columns if column.merge is not None]
    return [*own, SHARE, ABOVE_FLOOR] if table is HEADS else own


class NaiveCubes:
    """A table as arrays `[steps, places]`, float64."""

    def __init__(self, rows: pa.Table) -> None:
        frame = rows.to_pandas()
        if "head" not in frame:
            frame = frame.assign(call=0, head=-1)
        if "entropy" in frame:
            possible = frame["max_entropy"].astype(float).where(frame["max_entropy"] > 0)
            frame[SHARE] = frame["entropy"].astype(float) / possible
            frame[ABOVE_FLOOR] = frame["entropy"].astype(float) - frame["floor_row"].astype(float)
        self._frame = frame
        self.steps = np.unique(frame["step"].to_numpy(np.int64))
        first = frame.groupby("layer")["layer_index"].min()
        key = ["layer", "call", "head"]
        order = frame.drop_duplicates(key)[key].assign(at=lambda f: f["layer"].map(first))
        order = order.sort_values(["at", *key])
        self.places = [Place(*place) for place in order[key].itertuples(index=False, name=None)]
        index = {place: i for i, place in enumerate(self.places)}
        self._row = np.searchsorted(self.steps, frame["step"].to_numpy(np.int64))
        rows_of = frame[key].itertuples(index=False, name=None)
        self._place = np.array([index[Place(*place)] for place in rows_of], dtype=np.intp)

    def column(self, name: str) -> Doubles:
        """One figure; NaN where it is not known."""
        made = np.full((len(self.steps), len(self.places)), np.nan)
        made[self._row, self._place] = self._frame[name].to_numpy(np.float64)
        return made

    def present(self) -> npt.NDArray[np.bool_]:
        """Where there is a row."""
        made = np.zeros((len(self.steps), len(self.places)), dtype=bool)
        made[self._row, self._place] = True
        return made


def assert_cubes(found: Cubes, table: Table, rows: pa.Table) -> None:
    """Every figure is what the rows of the merged table say."""
    expected = NaiveCubes(rows)
    assert found.steps.tolist() == expected.steps.tolist()
    assert found.places == expected.places
    assert (found.measured, found.stride, found.in_blocks) == (len(expected.steps), 1, False)
    assert found.last == (expected.steps[-1] if len(expected.steps) else None)
    names = figures(table)
    for name, column in zip(names, found.columns(names), strict=True):
        assert column.dtype == np.float32
        np.testing.assert_allclose(column, expected.column(name), rtol=2e-6, atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(found.present(), expected.present())
    assert found.known(names) == {n for n in names if np.isfinite(expected.column(n)).any()}
    if table is HEADS:
        broken = expected.present() & ~np.isfinite(expected.column("entropy"))
        for place in range(len(found.places)):
            assert found.broken_steps(place).tolist() == found.steps[broken[:, place]].tolist()


def assert_followed(run: FollowedRun, expected: RunData | None = None, *, damaged: bool = False) -> None:
    """What was followed is what a fresh reading of the whole directory gives."""
    data = expected or read_run(run.path)
    assert_cubes(run.heads, HEADS, data.heads)
    assert_cubes(run.layers, LAYERS, data.layers)
    scalars = data.scalars.to_pandas()
    assert list(run.scalars) == list(dict.fromkeys(scalars["name"]))
    for name, (steps, values) in run.scalars.items():
        own = scalars[scalars["name"] == name]
        np.testing.assert_array_equal(steps, own["step"])
        np.testing.assert_array_equal(values, own["value"])
    assert repr(list(run.events)) == repr(list(data.alerts))
    assert (run.info, run.plan) == (data.info, data.plan)
    if not damaged:
        assert run.has_ended == bool(data.sessions and data.sessions[-1].closed)
        assert sorted(run.problems) == sorted(data.problems)


def follow(run_dir: Path, **options: int) -> FollowedRun:
    """A run of which everything was read once, so that all that is damaged is known."""
    run = FollowedRun(run_dir, **options)
    while True:  # what was damaged may have stood in the place of something else
        for table, cubes in ((HEADS, run.heads), (LAYERS, run.layers)):
            cubes.columns(figures(table))
        if not run.refresh():
            return run
