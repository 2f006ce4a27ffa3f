"""`RunView`: what pages ask about one run, answered in plain values and arrays, short enough to send."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from entropy_monitor.dashboards.alert_rows import alert_rows
from entropy_monitor.dashboards.decimation import bucket_starts, min_max
from entropy_monitor.dashboards.facts import fact_rows, plan_rows
from entropy_monitor.dashboards.shown_columns import HEAD_COLUMNS, LAYER_COLUMNS, ShownColumn
from entropy_monitor.dashboards.verdict import Digest, advice, digest
from entropy_monitor.errors import ConfigurationError
from entropy_monitor.frames import MOST_LAYERS, listed
from entropy_monitor.records import HEADS, SHARE, Alert
from entropy_monitor.store import Cubes, FollowedRun, latest_alerts

MOST_POSITIONS = 400
"""Steps of the slider: more cannot be told apart by hand."""

_LIVE_SECONDS = 300.0
"""A session that has not ended and wrote within this time is taken to be going on."""

_MOST_BROKEN = 100
_LOOK_BACK = 64
"""Measured steps over which a figure that is not read in all of them is carried on."""

OF_LAYER = "layer."
"""Stands before the name of a layer's column where heads have one of the same name."""

_HEAD = {column.name: column for column in HEAD_COLUMNS}
_LAYER = {column.name: column for column in LAYER_COLUMNS}
_ALWAYS_READ = {column.name for column in HEADS.columns if not column.nullable} | {SHARE}

Answer = dict[str, Any]
Floats = npt.NDArray[np.float32]
_T = TypeVar("_T")


class RunView:
    """One run as pages see it; follows the run as it grows.

    Answers are as of the last `refresh`. Not safe for use from several threads at once.

    Args:
        run_dir: the run's directory.
        name: what pages call it; by default the directory's name.

    Attributes:
        name: what pages call it.
        most_positions: most steps of the slider; may be set.

    Raises:
        RunDirectoryError: there is no run at `run_dir`.
    """

    def __init__(self, run_dir: str | os.PathLike[str], name: str | None = None) -> None:
        self._run = FollowedRun(run_dir)
        self.most_positions = MOST_POSITIONS
        self.name = self._run.path.resolve().name if name is None else name
        self._generation = 0
        self._kept: dict[Any, Any] = {}

    @property
    def path(self) -> Path:
        """The run's directory."""
        return self._run.path

    @property
    def version(self) -> str:
        """Changes whenever the answers may have."""
        return f"{self._generation}-{int(self._is_live())}"

    @property
    def problems(self) -> Sequence[str]:
        """What could not be read, in words."""
        return self._run.problems

    @property
    def digest(self) -> Digest:
        """The run in a few numbers and words."""
        return self._once("digest", lambda: digest(self.name, self._run, self.alerts))

    @property
    def alerts(self) -> list[Alert]:
        """In their last states, in the order in which they opened."""
        return self._once("alerts", lambda: latest_alerts(self._run.events))

    def refresh(self) -> str:
        """Reads what was added since; returns `version`.

        Raises:
            RunDirectoryError: the run is there no more.
        """
        if self._run.refresh():
            self._generation += 1
            self._kept.clear()
        return self.version

    def card(self) -> Answer:
        """A line in the list of runs."""
        summed = asdict(self.digest)
        heads = self._run.heads
        return {
            **summed,
            "model": str(self._run.info.get("model", {}).get("class", "")),
            "is_live": self._is_live(),
            "layers": len(self._layers),
            "heads": len(heads.places),
            "version": self.version,
            "problem": None,
        }

    def overview(self) -> Answer:
        """Everything about the run that is small: layers, heads, alerts, what can be shown of it."""
        heads, places = self._run.heads, self._run.heads.places
        of_heads, of_layers = heads.known(list(_HEAD)), self._run.layers.known(list(_LAYER))
        ranks = {name: i for i, name in enumerate(self._layers)}
        return {
            **self.card(),
            "layers": [{"name": name, "index": i} for i, name in enumerate(self._layers)],
            "rows": {
                "layer": np.array([ranks[p.layer] for p in places], dtype=np.int32),
                "call": np.array([p.call for p in places], dtype=np.int32),
                "head": np.array([p.head for p in places], dtype=np.int32),
            },
            "positions": heads.steps[self._positions()].astype(np.float64),
            "columns": [asdict(c) for c in HEAD_COLUMNS if c.name in of_heads],
            "layer_columns": [_of_layer(c) for c in LAYER_COLUMNS if c.name in of_layers],
            "scalars": list(self._run.scalars),
            "alerts": [row.to_dict() for row in alert_rows(self.alerts, places, ranks)],
            "advice": [asdict(piece) for piece in advice([(self.name, self.alerts)])],
            "problems": list(self._run.problems),
            "facts": fact_rows(self._run.info),
            "plan": plan_rows(self._run.plan),
        }

    def curves(self, column: str, layers: Sequence[int] | None = None, points: int = 600) -> Answer:
        """A column over steps, a curve for each layer: mean over its heads, in a band from lowest to highest.

        Args:
            column: of the heads, or of the layers (with `layer.` before it, which it needs where heads have
                one of the same name).
            layers: places in the list of layers; None: at most eight, evenly spaced, and the worst.
            points: most points of a curve.

        Raises:
            ConfigurationError: there is no such column or layer.
        """
        cubes, shown = self._cubes_of(column)
        wanted, remark = self.default_layers(column) if layers is None else (self._checked(layers), "")
        return {
            "column": column,
            "layers": self._bands(cubes, shown.name, wanted, points),
            "maximum": self._bands(cubes, "max_entropy", wanted, points) if column == "entropy" else [],
            "remark": remark,
        }

    def default_layers(self, column: str) -> tuple[list[int], str]:
        """Which layers a figure of a column shows, and a remark where that is not all.

        At most eight, evenly spaced, the one with the worst value among them.

        Raises:
            ConfigurationError: there is no such column.
        """
        cubes, shown = self._cubes_of(column)
        names = self._layers
        if len(names) <= MOST_LAYERS:
            return list(range(len(names))), ""
        places = np.linspace(0, len(names) - 1, MOST_LAYERS).round().astype(int).tolist()
        remark = f"{MOST_LAYERS} of {len(names)} layers, evenly spaced"
        name = SHARE if shown.name == "entropy" else shown.name  # layers differ in how many keys they see
        values = cubes.column(name, shown.bad)
        known = np.where(np.isfinite(values), values, np.inf if shown.bad == "low" else -np.inf)
        if known.size and np.isfinite(known).any():
            place = int(known.argmin() if shown.bad == "low" else known.argmax()) % values.shape[1]
            worst = names.index(cubes.places[place].layer)
            if worst not in places:
                nearest = min(range(len(places)), key=lambda i: abs(places[i] - worst))
                places[nearest] = worst
                remark += f", and the one with the {'lowest' if shown.bad == 'low' else 'largest'} value"
        return sorted(places), remark

    def summary_curves(self, points: int = 600) -> Answer:
        """The whole run in four curves, to stand beside those of other runs."""
        heads = self._run.heads
        share = heads.column(SHARE)
        starts = bucket_starts(len(heads.steps), points)
        steps = heads.steps[starts].astype(np.float64)
        return {
            "loss": self.scalar("loss", points),
            "share": {
                "steps": steps,
                "mean": _reduced(_row_mean(share), starts, "mean"),
                "low": _reduced(_least(heads.column(SHARE, "low")), starts, "low"),
            },
            "sigma": self._largest("sigma_qk", points),
            "logit": self._largest("max_logit", points),
        }

    def grid(self, column: str, position: int) -> Answer:
        """One figure of every head at one position of the slider: the worst of the steps it stands for.

        What is not read in every measured step is carried on for a while.

        Raises:
            ConfigurationError: there is no such column or position.
        """
        heads, shown, starts = self._run.heads, self._head_column(column), self._positions()
        if not 0 <= position < len(starts):
            raise ConfigurationError(f"position is {position}; this run has {len(starts)}")
        bad = shown.bad
        cube = heads.column(column, bad)
        first = int(starts[position])
        end = int(starts[position + 1]) if position + 1 < len(starts) else len(heads.steps)
        reduce = np.fmin.reduce if bad == "low" else np.fmax.reduce
        values: Floats = reduce(cube[first:end], axis=0)
        if column not in _ALWAYS_READ:
            for earlier in cube[max(0, first - _LOOK_BACK) : first][::-1]:
                if not np.isnan(values).any():
                    break
                values = np.where(np.isnan(values), earlier, values)
        low, high = self._once(("range", column), lambda: _range(heads, column))
        return {
            "column": column,
            "position": position,
            "step": int(heads.steps[first]),
            "values": values.astype(np.float32),
            "low": low,
            "high": high,
        }

    def head(self, row: int, points: int = 1000) -> Answer:
        """All that is known of one head over steps, and of its layer.

        Raises:
            ConfigurationError: there is no such row.
        """
        heads, layers = self._run.heads, self._run.layers
        if not 0 <= row < len(heads.places):
            raise ConfigurationError(f"row is {row}; this run has {len(heads.places)}")
        heads.columns(list(_HEAD))  # at once is quicker
        place = heads.places[row]
        of_layer = [i for i, p in enumerate(layers.places) if p.layer == place.layer]
        return {
            "row": row,
            "layer": place.layer,
            "call": place.call,
            "head": place.head,
            "series": _series(heads, [c.name for c in HEAD_COLUMNS], row, points),
            "layer_series": _series(layers, [c.name for c in LAYER_COLUMNS], of_layer[0], points)
            if of_layer
            else {},
            "broken": heads.broken_steps(row)[:_MOST_BROKEN].astype(np.float64),
        }

    def matrix(self, column: str, *, of_layers: bool = False) -> Answer:
        """A whole column at the slider's positions, for a page without a server.

        Returns:
            `steps` `[P]`; `low` and `high` `[P, rows]`, the least and largest value of the steps that a
            position stands for, high None where they are one; `mean` `[P, layers]`, over heads and steps.

        Args:
            column: of the heads.
            of_layers: of the layers instead; rows are layers then.

        Raises:
            ConfigurationError: there is no such column.
        """
        if column not in (_LAYER if of_layers else _HEAD):
            raise ConfigurationError(f"column is {column!r}; there is none of this name")
        cubes = self._run.layers if of_layers else self._run.heads
        starts = bucket_starts(len(cubes.steps), self.most_positions)
        low, high, mean = (cubes.column(column, of) for of in ("low", "high", "mean"))
        of_layer: dict[str, list[int]] = {name: [] for name in self._layers}
        for i, place in enumerate(cubes.places):
            of_layer[place.layer].append(i)
        means = [_reduced(_row_mean(_part(mean, own)), starts, "mean") for own in of_layer.values()]
        if of_layers:  # in the order of the run's layers, which may have rows of heads alone
            low, high = (_spread(values, list(of_layer.values())) for values in (low, high))
        is_exact = len(starts) == len(cubes.steps) and not cubes.in_blocks
        return {
            "steps": cubes.steps[starts].astype(np.float64),
            "low": _reduced(low, starts, "low"),
            "high": None if is_exact else _reduced(high, starts, "high"),
            "mean": np.stack(means, axis=1) if means else np.empty((len(starts), 0), np.float32),
        }

    def scalar(self, name: str = "loss", points: int = 1000) -> Answer:
        """A scalar by step; empty where the run has none of this name."""
        steps, values = self._run.scalars.get(name, (np.empty(0, np.int64), np.empty(0)))
        known = np.where(np.isfinite(values), values, np.nan)
        drawn, heights = min_max(steps, known, known, points)
        broken = steps[~np.isfinite(values)][:_MOST_BROKEN].astype(np.float64)
        return {"name": name, "steps": drawn, "values": heights, "broken": broken}

    def attention_map(self, key: str) -> Answer:
        """The attention map that an alert keeps.

        Raises:
            ConfigurationError: there is no such alert, or it has no map.
        """
        ranks = {name: i for i, name in enumerate(self._layers)}
        for row in alert_rows(self.alerts, self._run.heads.places, ranks):
            if row.key == key and row.map is not None:
                return {"map": row.map, "alt": row.map_text}
        raise ConfigurationError(f"alert {key!r} has no attention map")

    @property
    def _layers(self) -> list[str]:
        places = [*self._run.heads.places, *self._run.layers.places]
        return list(dict.fromkeys(place.layer for place in places))

    def _is_live(self) -> bool:
        return not self._run.has_ended and time.time() - self._run.written < _LIVE_SECONDS

    def _positions(self) -> npt.NDArray[np.intp]:
        return bucket_starts(len(self._run.heads.steps), self.most_positions)

    def _once(self, key: Any, make: Callable[[], _T]) -> _T:
        if key not in self._kept:
            self._kept[key] = make()
        kept: _T = self._kept[key]
        return kept

    def _head_column(self, name: str) -> ShownColumn:
        if name not in _HEAD:
            raise ConfigurationError(f"column is {name!r}; heads have {listed(list(_HEAD), 20)}")
        return _HEAD[name]

    def _cubes_of(self, column: str) -> tuple[Cubes, ShownColumn]:
        if column in _HEAD:
            return self._run.heads, _HEAD[column]
        if column.removeprefix(OF_LAYER) in _LAYER:
            return self._run.layers, _LAYER[column.removeprefix(OF_LAYER)]
        raise ConfigurationError(
            f"column is {column!r}; a curve can be drawn of {listed([*_HEAD, *_LAYER], 30)}"
        )

    def _checked(self, layers: Sequence[int]) -> list[int]:
        for place in layers:
            if not 0 <= place < len(self._layers):
                raise ConfigurationError(f"layer is {place}; this run has {len(self._layers)} layers")
        return list(layers)

    def _bands(self, cubes: Cubes, column: str, wanted: Sequence[int], points: int) -> list[Answer]:
        names = self._layers
        mean, low, high = (cubes.column(column, of) for of in ("mean", "low", "high"))
        bands = []
        for place in wanted:
            own = [i for i, p in enumerate(cubes.places) if p.layer == names[place]]
            means = _row_mean(_part(mean, own))
            known = np.flatnonzero(~np.isnan(means))
            starts = bucket_starts(len(known), points)
            bands.append(
                {
                    "layer": place,
                    "steps": cubes.steps[known][starts].astype(np.float64),
                    "mean": _reduced(means[known], starts, "mean"),
                    "low": _reduced(_least(_part(low, own))[known], starts, "low"),
                    "high": _reduced(_largest(_part(high, own))[known], starts, "high"),
                }
            )
        return bands

    def _largest(self, column: str, points: int) -> Answer:
        """The largest value of any head, at the steps at which it is known of all heads that are there."""
        heads = self._run.heads
        cube = heads.column(column, "high")
        known = ~np.isnan(cube)
        waited_for = heads.present() & ~known & np.logical_or.accumulate(known, axis=0)
        values = np.where(waited_for.any(axis=1), np.float32(np.nan), _largest(cube))
        steps, heights = min_max(heads.steps, values, values, points)
        return {"steps": steps, "values": heights}


def _spread(values: Floats, places: Sequence[Sequence[int]]) -> Floats:
    """A column for each of `places`, which name one each or none; NaN for those."""
    spread = np.full((len(values), len(places)), np.nan, np.float32)
    for to, own in enumerate(places):
        if own:
            spread[:, to] = values[:, own[0]]
    return spread


def _of_layer(column: ShownColumn) -> Answer:
    """A layer's column for the menu of curves, told apart from that of heads."""
    shown = asdict(column)
    return {**shown, "name": OF_LAYER + column.name} if column.name in _HEAD else shown


def _series(cubes: Cubes, columns: Sequence[str], place: int, points: int) -> Answer:
    series = {}
    for column in columns:
        low, high = cubes.column(column, "low")[:, place], cubes.column(column, "high")[:, place]
        finite = np.isfinite(low) & np.isfinite(high)
        if finite.any():
            low, high = np.where(finite, low, np.nan), np.where(finite, high, np.nan)
            steps, values = min_max(cubes.steps, low, high, points)
            series[column] = {"steps": steps, "values": values}
    return series


def _range(heads: Cubes, column: str) -> tuple[float | None, float | None]:
    low, high = heads.column(column, "low"), heads.column(column, "high")
    low, high = low[np.isfinite(low)], high[np.isfinite(high)]
    return (float(low.min()), float(high.max())) if low.size and high.size else (None, None)


def _part(values: Floats, columns: Sequence[int]) -> Floats:
    """Some columns; those that stand side by side, as the heads of a layer do, without a copy."""
    if columns and columns[-1] - columns[0] == len(columns) - 1:
        return values[:, columns[0] : columns[-1] + 1]
    return values[:, list(columns)]


def _row_mean(values: Floats) -> Floats:
    """`[steps]`: the mean of what is finite; NaN where nothing is."""
    known = np.isfinite(values)
    count = known.sum(axis=1)
    total = np.where(known, values, 0).sum(axis=1, dtype=np.float64)
    mean: Floats = np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)
    return mean


def _least(values: Floats) -> Floats:
    least: Floats = np.where(np.isfinite(values), values, np.inf).min(axis=1, initial=np.inf)
    return np.where(np.isinf(least), np.float32(np.nan), least)


def _largest(values: Floats) -> Floats:
    largest: Floats = np.where(np.isfinite(values), values, -np.inf).max(axis=1, initial=-np.inf)
    return np.where(np.isinf(largest), np.float32(np.nan), largest)


def _reduced(values: Floats, starts: npt.NDArray[np.intp], how: str) -> Floats:
    """Each bucket of a curve `[steps]`, or of several `[steps, n]`, as one value; NaN is left out."""
    if not len(starts):
        return np.empty((0, *values.shape[1:]), np.float32)
    if how == "low":
        return np.fmin.reduceat(values, starts).astype(np.float32)
    if how == "high":
        return np.fmax.reduceat(values, starts).astype(np.float32)
    known = ~np.isnan(values)
    total = np.add.reduceat(np.where(known, values, 0).astype(np.float64), starts)
    count = np.add.reduceat(known.astype(np.float64), starts)
    mean: Floats = np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)
    return mean
