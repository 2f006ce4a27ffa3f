"""Curves of a run out of its columns: of layers, of one head, of all heads together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from entropy_monitor.dashboards.decimation import bucket_starts, min_max
from entropy_monitor.dashboards.reductions import part, reduced, row_largest, row_least, row_mean
from entropy_monitor.dashboards.shown_columns import ShownColumn
from entropy_monitor.frames import MOST_LAYERS
from entropy_monitor.records import SHARE
from entropy_monitor.store import Cubes

Curve = dict[str, Any]


def layer_bands(cubes: Cubes, column: str, of_layers: Sequence[Sequence[int]], points: int) -> list[Curve]:
    """For each layer the mean over its heads, and their least and largest value.

    Args:
        cubes: of heads or of layers.
        column: one of theirs.
        of_layers: the places of each layer.
        points: most points of a curve.
    """
    mean, low, high = (cubes.column(column, of) for of in ("mean", "low", "high"))
    bands = []
    for own in of_layers:
        means = row_mean(part(mean, own))
        known = np.flatnonzero(~np.isnan(means))
        starts = bucket_starts(len(known), points)
        bands.append(
            {
                "steps": cubes.steps[known][starts].astype(np.float64),
                "mean": reduced(means[known], starts, "mean"),
                "low": reduced(row_least(part(low, own))[known], starts, "low"),
                "high": reduced(row_largest(part(high, own))[known], starts, "high"),
            }
        )
    return bands


def chosen_layers(cubes: Cubes, shown: ShownColumn, names: Sequence[str]) -> tuple[list[int], str]:
    """Which of the layers to draw: at most eight, evenly spaced, the one with the worst value among them.

    Returns:
        Their places in `names`, and a remark where these are not all.
    """
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


def share_curve(heads: Cubes, points: int) -> Curve:
    """Entropy over its maximum: the mean over all heads, and the lowest head."""
    starts = bucket_starts(len(heads.steps), points)
    return {
        "steps": heads.steps[starts].astype(np.float64),
        "mean": reduced(row_mean(heads.column(SHARE)), starts, "mean"),
        "low": reduced(row_least(heads.column(SHARE, "low")), starts, "low"),
    }


def largest_curve(heads: Cubes, column: str, points: int) -> Curve:
    """The largest value of any head, at the steps at which it is known of all heads that are there.

    A head that was never read yet is not waited for.
    """
    cube = heads.column(column, "high")
    known = ~np.isnan(cube)
    waited_for = heads.present() & ~known & np.logical_or.accumulate(known, axis=0)
    values = np.where(waited_for.any(axis=1), np.float32(np.nan), row_largest(cube))
    steps, heights = min_max(heads.steps, values, values, points)
    return {"steps": steps, "values": heights}


def series_of(cubes: Cubes, columns: Sequence[str], place: int, points: int) -> dict[str, Curve]:
    """Every column of one place that is known somewhere, through the extremes of each stretch."""
    series = {}
    lows, highs = cubes.columns(columns, "low"), cubes.columns(columns, "high")  # at once is quicker
    for column, low, high in zip(columns, lows, highs, strict=True):
        low, high = low[:, place], high[:, place]
        finite = np.isfinite(low) & np.isfinite(high)
        if finite.any():
            low, high = np.where(finite, low, np.nan), np.where(finite, high, np.nan)
            steps, values = min_max(cubes.steps, low, high, points)
            series[column] = {"steps": steps, "values": values}
    return series
