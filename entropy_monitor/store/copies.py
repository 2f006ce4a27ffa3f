"""Tells ranks that hold copies of the same weights from those that hold others under the same names.

Data parallel processes train copies. Where weights are split without DTensors (Megatron), or where a stage
of a pipeline numbers its layers from 0, no process can tell that its head 0 is another one than its
neighbour's. Their rows look like readings of the same heads; merged, they would give figures of no head at
all. The weights give them away: their spectral norms differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from entropy_monitor.records import HEADS, LAYERS, AlertEvent, Table

if TYPE_CHECKING:
    from entropy_monitor.store.merge import Part

_TOLERANCE = 1e-3  # relative: far above what the same weights give on other hardware, far below chance
_WEIGHTS = ("sigma_q", "sigma_k")

Strangers: TypeAlias = dict[tuple[int, str], tuple[int, ...]]
"""Session and layer to the ranks whose rows of that layer belong to other weights than the lowest rank's."""


def strangers(parts: Mapping[str, Sequence[Part]]) -> Strangers:
    """Which ranks' rows must not be merged with those of lower ranks.

    Looked at are the first and the last step that all ranks of a session measured.

    Args:
        parts: what every rank wrote, by table.
    """
    found: dict[tuple[int, str], set[int]] = {}
    for table in (HEADS, LAYERS):
        of_table = [part for part in parts.get(table.name, ()) if part.rows.num_rows]
        for session in sorted({part.session for part in of_table}):
            ranks = sorted((p for p in of_table if p.session == session), key=lambda part: part.rank)
            for layer, rank in _differing(table, ranks):
                found.setdefault((session, layer), set()).add(rank)
    return {key: tuple(sorted(ranks)) for key, ranks in sorted(found.items())}


def without(parts: Sequence[Part], found: Strangers) -> list[Part]:
    """The parts without the rows of strangers."""
    kept = []
    for part in parts:
        left_out = [
            layer
            for (session, layer), ranks in found.items()
            if session == part.session and part.rank in ranks
        ]
        if left_out and "layer" in part.rows.column_names:
            others = pc.invert(pc.is_in(part.rows["layer"], pa.array(left_out)))
            kept.append(replace(part, rows=part.rows.filter(others)))
        else:
            kept.append(part)
    return kept


def events_without(
    logs: Mapping[tuple[int, int], Sequence[AlertEvent]], found: Strangers
) -> dict[tuple[int, int], list[AlertEvent]]:
    """The alerts by session and rank, without those of strangers: the heads that they name are others."""
    return {
        (session, rank): [e for e in events if rank not in found.get((session, e.alert.layer or ""), ())]
        for (session, rank), events in logs.items()
    }


def in_words(found: Strangers) -> list[str]:
    """What is left out and why, a line for each session and set of ranks."""
    layers: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    for (session, layer), ranks in found.items():
        layers.setdefault((session, ranks), []).append(layer)
    return [
        f"session {session}: ranks {', '.join(map(str, ranks))} hold other weights than lower ranks under "
        f"the same heads of {', '.join(names[:5])}{' and others' if len(names) > 5 else ''}, as in tensor or "
        "pipeline parallel training without DTensors; what they measured there is left out, since "
        "it is not known which heads these are"
        for (session, ranks), names in layers.items()
    ]


def _differing(table: Table, ranks: Sequence[Part]) -> list[tuple[str, int]]:
    """Layers and the ranks that hold other weights there than a lower rank."""
    if len(ranks) < 2:
        return []
    steps = [np.unique(part.rows["step"].to_numpy()) for part in ranks]
    common = steps[0]
    for other in steps[1:]:
        common = np.intersect1d(common, other)
    if not len(common):
        return []
    looked_at = pa.array(sorted({int(common[0]), int(common[-1])}))
    of_ranks = [part.rows.filter(pc.is_in(part.rows["step"], looked_at)) for part in ranks]
    if _are_copies(table, of_ranks):
        return []
    known: dict[Any, tuple[float, ...]] = {}
    found: list[tuple[str, int]] = []
    for part, rows in zip(ranks, of_ranks, strict=True):
        own = _weights(table, rows)
        bad = {layer for (layer, key), w in own.items() if not _agree(w, known.get((layer, key), w))}
        found += [(layer, part.rank) for layer in sorted(bad)]
        for (layer, key), weights in own.items():
            if layer not in bad:
                known.setdefault((layer, key), weights)
    return found


def _are_copies(table: Table, ranks: Sequence[pa.Table]) -> bool:
    """Whether all ranks surely hold the same weights: what is usual, and is told at once."""
    keys = [rows.select(table.key) for rows in ranks]
    if not all(other.equals(keys[0]) for other in keys[1:]):
        return False
    for name in _WEIGHTS:
        weights = np.stack([rows[name].to_numpy() for rows in ranks])
        least, largest = np.fmin.reduce(weights), np.fmax.reduce(weights)
        with np.errstate(invalid="ignore"):
            if (largest - least > _TOLERANCE * np.abs(least)).any():
                return False
    return True


def _weights(table: Table, rows: pa.Table) -> dict[tuple[str, Any], tuple[float, ...]]:
    keys = zip(*(rows[name].to_pylist() for name in table.key), strict=True)
    weights = zip(*(rows[name].to_numpy().tolist() for name in _WEIGHTS), strict=True)
    layers = rows["layer"].to_pylist()
    return {(layer, key): values for layer, key, values in zip(layers, keys, weights, strict=True)}


def _agree(one: tuple[float, ...], two: tuple[float, ...]) -> bool:
    """Whether norms are the same up to rounding; what is not known agrees with all."""
    return not any(abs(a - b) > _TOLERANCE * max(abs(a), abs(b)) for a, b in zip(one, two, strict=True))
