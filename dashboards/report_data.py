"""What a report carries in itself: all that the page may ask, as whole columns in 16 bits a value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from entropy_monitor.dashboards.packing import Quantised
from entropy_monitor.dashboards.run_view import OF_LAYER, RunView
from entropy_monitor.dashboards.shown_columns import HEAD_COLUMNS, LAYER_COLUMNS
from entropy_monitor.records import ABOVE_FLOOR, SHARE

_MOST_SCALARS = 40
_MAIN = {SHARE, ABOVE_FLOOR, "sigma_qk", "max_logit", "entropy", "max_entropy"}
_LOG = {column.name for column in (*HEAD_COLUMNS, *LAYER_COLUMNS) if column.scale == "log"}


def report_data(
    views: Mapping[str, RunView], folder: str, positions: int, *, main_only: bool = False
) -> dict[str, Any]:
    """The data of `static/source_embedded.js`, to be packed.

    Args:
        views: the runs by their ids.
        folder: what the page names as the place of the runs.
        positions: most steps of each run.
        main_only: whether of heads only the figures that say most are carried.
    """
    for view in views.values():
        view.most_positions = positions
    return {
        "folder": folder,
        "runs": [{"id": run, **view.card(), "is_live": False} for run, view in views.items()],
        "details": {run: _detail(view, main_only) for run, view in views.items()},
    }


def _detail(view: RunView, main_only: bool) -> dict[str, Any]:
    overview = {**view.overview(), "is_live": False}
    overview["columns"] = [c for c in overview["columns"] if not main_only or c["name"] in _MAIN]
    of_heads = [column["name"] for column in overview["columns"]]
    of_layers = [column["name"] for column in overview["layer_columns"]]
    return {
        "overview": overview,
        "summary": view.summary_curves(),
        "scalars": {name: view.scalar(name) for name in overview["scalars"][:_MOST_SCALARS]},
        "maps": {a["key"]: view.attention_map(a["key"]) for a in overview["alerts"] if a["has_map"]},
        "heads": {name: _narrow(name, view.matrix(name)) for name in of_heads},
        "layers": {
            name: _narrow(name, view.matrix(name, of_layers=True))
            for name in (shown.removeprefix(OF_LAYER) for shown in of_layers)
        },
        "chosen": {
            name: dict(zip(("layers", "remark"), view.default_layers(name), strict=True))
            for name in (*of_heads, *of_layers)
        },
    }


def _narrow(name: str, matrix: Mapping[str, Any]) -> dict[str, Any]:
    return {
        part: values if part == "steps" or values is None else Quantised(values, log=name in _LOG)
        for part, values in matrix.items()
    }


def expected_bytes(views: Mapping[str, RunView], positions: int, *, main_only: bool = False) -> float:
    """About how much the heads' figures weigh in a report: they hardly compress, and take 4/3 as text."""
    columns = len(_MAIN) if main_only else len(HEAD_COLUMNS)
    cells = 0
    for view in views.values():
        steps, ends = view.digest.measured, 2 if view.digest.measured > positions else 1
        cells += min(steps, positions) * view.card()["heads"] * columns * ends
    return 2 * cells * 4 / 3
