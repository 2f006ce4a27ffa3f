"""Alerts as pages list them: in words, and with the heads they concern as rows of the map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from entropy_monitor.dashboards.evidence_text import evidence_rows
from entropy_monitor.records import Alert
from entropy_monitor.store import Place


@dataclass(frozen=True)
class AlertRow:
    """An alert; `key` tells it from all others of its run.

    Attributes:
        layer_place: place of its layer in order of execution; None where it concerns the whole run.
        rows: the heads it concerns, as places among the run's heads; those of all calls.
        worst_row: of these, the one that its evidence is of.
        evidence: label and text of each figure.
        map: `[queries, keys]`, the attention map of the worst head, None where there is none.
        map_text: what the map is of.
    """

    key: str
    id: str
    kind: str
    severity: str
    layer: str
    layer_place: int | None
    heads: tuple[int, ...]
    rows: tuple[int, ...]
    worst_row: int | None
    opened: int
    updated: int
    closed: int | None
    title: str
    message: str
    advice: str
    evidence: list[tuple[str, str]]
    map: npt.NDArray[np.float32] | None
    map_text: str

    def to_dict(self) -> dict[str, Any]:
        """All but the map, and whether there is one."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**values, "map": None, "has_map": self.map is not None}


def alert_rows(alerts: Sequence[Alert], places: Sequence[Place], ranks: Mapping[str, int]) -> list[AlertRow]:
    """The alerts in the order given.

    Args:
        alerts: in their last states.
        places: the run's heads.
        ranks: the layers' places in order of execution.
    """
    by_layer: dict[str, list[tuple[int, Place]]] = {}
    for row, place in enumerate(places):
        by_layer.setdefault(place.layer, []).append((row, place))
    return [_row(alert, by_layer.get(alert.layer, []), ranks.get(alert.layer)) for alert in alerts]


def _row(alert: Alert, own: Sequence[tuple[int, Place]], layer_place: int | None) -> AlertRow:
    evidence = alert.evidence
    worst = (evidence.get("call", 0), evidence.get("worst_head"))
    drawn = _matrix(evidence.get("map"))
    call = f", call {worst[0]}" if worst[0] else ""
    head = "the worst head" if worst[1] is None else f"head {worst[1]}"
    return AlertRow(
        key=f"{alert.id}@{alert.opened}",
        id=alert.id,
        kind=alert.kind,
        severity=alert.severity,
        layer=alert.layer,
        layer_place=layer_place,
        heads=tuple(alert.heads),
        rows=tuple(row for row, place in own if place.head in alert.heads),
        worst_row=next((row for row, place in own if (place.call, place.head) == worst), None),
        opened=alert.opened,
        updated=alert.updated,
        closed=alert.closed,
        title=alert.title,
        message=alert.message,
        advice=alert.advice,
        evidence=evidence_rows(evidence),
        map=drawn,
        map_text=f"Attention map of {head} of {alert.layer}{call}" if drawn is not None else "",
    )


def _matrix(rows: Any) -> npt.NDArray[np.float32] | None:
    """The map as an array; None where it is none: the rest of the alert is worth showing."""
    if rows is None:
        return None
    try:
        matrix = np.asarray([list(row) for row in rows], dtype=np.float32)
    except (TypeError, ValueError, OverflowError):
        return None
    return matrix if matrix.ndim == 2 and matrix.size else None
