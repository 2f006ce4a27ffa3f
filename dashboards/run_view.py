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
from entropy_monitor.dashboards.curves import (
    chosen_layers,
    largest_curve,
    layer_bands,
    series_of,
    share_curve,
)
from entropy_monitor.dashboards.decimation import bucket_starts, min_max
from entropy_monitor.dashboards.facts import fact_rows, plan_rows
from entropy_monitor.dashboards.positions import at_all, finite_range, spread, worst_at
from entropy_monitor.dashboards.shown_columns import HEAD_COLUMNS, LAYER_COLUMNS, ShownColumn
from entropy_monitor.dashboards.verdict import Digest, advice, digest
from entropy_monitor.errors import ConfigurationError
from entropy_monitor.frames import listed
from entropy_monitor.records import Alert
from entropy_monitor.store import Cubes, FollowedRun, latest_alerts

MOST_POSITIONS = 400
"""Steps of the slider: more cannot be told apart by hand."""

_LIVE_SECONDS = 300.0
"""A session that has not ended and wrote within this time is taken to be going on."""

_MOST_BROKEN = 100

OF_LAYER = "layer."
"""Stands before the name of a layer's column where heads have one of the same name."""

_HEAD = {column.name: column for column in HEAD_COLUMNS}
_LAYER = {column.name: column for column in LAYER_COLUMNS}

Answer = dict[str, Any]
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

    def verify(self) -> None:
        """Checks all that the run's tables hold, so that `problems` and the digest know of every damage.

        Raises:
            RunDirectoryError: the run is there no more.
        """
        self._run.verify()
        self._generation += 1
        self._kept.clear()

    def card(self) -> Answer:
        """A line in the list of runs."""
        summed = asdict(self.digest)
        heads = self._run.heads
        return {
            **summed,
            "model": self._model,
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
        return chosen_layers(*self._cubes_of(column), self._layers)

    def summary_curves(self, points: int = 600) -> Answer:
        """The whole run in four curves, to stand beside those of other runs."""
        heads = self._run.heads
        return {
            "loss": self.scalar("loss", points),
            "share": share_curve(heads, points),
            "sigma": largest_curve(heads, "sigma_qk", points),
            "logit": largest_curve(heads, "max_logit", points),
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
        low, high = self._once(("range", column), lambda: finite_range(heads, column))
        return {
            "column": column,
            "position": position,
            "step": int(heads.steps[starts[position]]),
            "values": worst_at(heads, shown, starts, position),
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
        place = heads.places[row]
        of_layer = [i for i, p in enumerate(layers.places) if p.layer == place.layer]
        return {
            "row": row,
            "layer": place.layer,
            "call": place.call,
            "head": place.head,
            "series": series_of(heads, list(_HEAD), row, points),
            "layer_series": series_of(layers, list(_LAYER), of_layer[0], points) if of_layer else {},
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
        places, starts = self._places_of(cubes), bucket_starts(len(cubes.steps), self.most_positions)
        found = at_all(cubes, column, starts, places)
        if of_layers:  # in the order of the run's layers, which may have rows of heads alone
            found |= {end: spread(found[end], places) for end in ("low", "high") if found[end] is not None}
        return found

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
    def _model(self) -> str:
        model = self._run.info.get("model")
        return str(model.get("class", "")) if isinstance(model, dict) else ""

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
        own = self._places_of(cubes)
        bands = layer_bands(cubes, column, [own[place] for place in wanted], points)
        return [{"layer": place, **band} for place, band in zip(wanted, bands, strict=True)]

    def _places_of(self, cubes: Cubes) -> list[list[int]]:
        """For each layer its places among the columns of an array."""
        found: dict[str, list[int]] = {name: [] for name in self._layers}
        for i, place in enumerate(cubes.places):
            found[place.layer].append(i)
        return list(found.values())


def _of_layer(column: ShownColumn) -> Answer:
    """A layer's column for the menu of curves, told apart from that of heads."""
    shown = asdict(column)
    return {**shown, "name": OF_LAYER + column.name} if column.name in _HEAD else shown
