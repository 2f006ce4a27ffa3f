"""One timeline out of many files: sessions that overlap, ranks that read parts of the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from entropy_monitor.records import HEADS, LAYERS, SCALARS, Alert, AlertEvent, Table
from entropy_monitor.store.codec import arrow_schema
from entropy_monitor.store.ordering import group_starts, sort_order
from entropy_monitor.store.ranks import merge_ranks

_ORDER = {
    HEADS: ("step", "layer_index", "layer", "call", "head"),
    LAYERS: ("step", "layer_index", "layer"),
    SCALARS: ("step",),
}


@dataclass(frozen=True)
class Part:
    """What one rank of one session wrote of one table, in the order of writing.

    Attributes:
        session: from 0.
        rank: of the process.
        rows: what it wrote.
        group: the lowest of the ranks that worked on the same sequences (tensor parallel), None where it
            worked on its own: what several of these read is the same reading.
    """

    session: int
    rank: int
    rows: pa.Table
    group: int | None = None


def cutoffs(parts: Sequence[Part]) -> dict[int, int]:
    """For each session that a later one overtook, the first step that is not its own any more."""
    first: dict[int, int] = {}
    for part in parts:
        if part.rows.num_rows:
            step = int(part.rows["step"].to_numpy().min())
            first[part.session] = min(step, first.get(part.session, step))
    return ends_of(first)


def ends_of(first: Mapping[int, int]) -> dict[int, int]:
    """For each session that a later one overtook, the first step that is not its own any more.

    A process that starts again goes back to its checkpoint: what the earlier one measured at or
    after the first step of the later one belongs to a timeline that was left.

    Args:
        first: the first step of each session that has any.
    """
    ends: dict[int, int] = {}
    earliest: int | None = None
    for session in range(max(first, default=-1), -1, -1):
        if earliest is not None:
            ends[session] = earliest
        if session in first:
            earliest = first[session] if earliest is None else min(earliest, first[session])
    return ends


def merge_table(table: Table, parts: Sequence[Part], ends: Mapping[int, int]) -> pa.Table:
    """The run's rows, one for each key, in the order of step and place in the model.

    Where a rank wrote a key twice, its later row counts. Where several ranks of a session wrote it,
    `merge_ranks`; of ranks that read the same sequences, only the lowest counts there.
    """
    sessions: dict[int, dict[int, list[pa.Table]]] = {}
    for part in sorted(parts, key=lambda part: (part.session, part.rank)):
        rows = part.rows
        if part.session in ends:
            rows = rows.filter(pa.array(rows["step"].to_numpy() < ends[part.session]))
        if rows.num_rows:
            group = part.rank if part.group is None else part.group
            groups = sessions.setdefault(part.session, {})
            groups.setdefault(group, []).append(_last_of_each(table, rows))
    merged = [merge_ranks(table, _without_copies(table, groups)) for groups in sessions.values()]
    if not merged:
        return arrow_schema(table).empty_table()
    rows = pa.concat_tables(merged)
    return rows.take(pa.array(sort_order(rows, _ORDER[table])))


def merge_events(
    logs: Mapping[tuple[int, int], Sequence[AlertEvent]], ends: Mapping[int, int]
) -> list[AlertEvent]:
    """All ranks' events of the timeline that counts, in order of session, step and rank.

    Ranks that hold copies of the same heads find the same things: of alerts of one session that
    concern the same kind, layer and heads at the same time, those of the lowest rank are kept. Ranks
    number their alerts on their own: the ids of others than 0 are given the rank, as in `a-0001-r2`.

    Args:
        logs: by (session, rank), in the order of writing.
        ends: as from `cutoffs`.
    """
    merged: list[AlertEvent] = []
    for session in sorted({session for session, _ in logs}):
        events: list[AlertEvent] = []
        kept: list[Alert] = []
        for rank in sorted(rank for s, rank in logs if s == session):
            own = [_of_rank(rank, e) for e in logs[session, rank] if e.step < ends.get(session, e.step + 1)]
            new = [a for a in latest_alerts(own) if not any(_same(a, other) for other in kept)]
            identities = {_identity(alert) for alert in new}
            events += [event for event in own if _identity(event.alert) in identities]
            kept += new
        merged += sorted(events, key=lambda event: event.step)
    return merged


def latest_alerts(events: Sequence[AlertEvent]) -> list[Alert]:
    """The last state of every alert, in the order in which they opened."""
    last = {_identity(event.alert): event.alert for event in events}
    return sorted(last.values(), key=lambda alert: alert.opened)


def _identity(alert: Alert) -> tuple[str, int]:
    # An analyzer that was not restored counts its ids from the start again.
    return alert.id, alert.opened


def _of_rank(rank: int, event: AlertEvent) -> AlertEvent:
    return replace(event, alert=replace(event.alert, id=f"{event.alert.id}-r{rank}")) if rank else event


def _same(alert: Alert, other: Alert) -> bool:
    if (alert.kind, alert.layer) != (other.kind, other.layer):
        return False
    if (alert.heads or other.heads) and not set(alert.heads) & set(other.heads):
        return False
    begins_before_end = other.closed is None or alert.opened <= other.closed
    ends_after_begin = alert.closed is None or alert.closed >= other.opened
    return begins_before_end and ends_after_begin


def _without_copies(table: Table, groups: Mapping[int, Sequence[pa.Table]]) -> list[pa.Table]:
    if all(column.merge in (None, "same") for column in table.columns):
        return [rows for ranks in groups.values() for rows in ranks]  # copies do no harm, and may know more
    return [
        ranks[0] if len(ranks) == 1 else _last_of_each(table, pa.concat_tables(reversed(ranks)))
        for ranks in groups.values()
    ]


def _last_of_each(table: Table, rows: pa.Table) -> pa.Table:
    order = sort_order(rows, table.key)
    last = np.append(group_starts(rows, table.key, order)[1:], len(order)) - 1
    if len(last) == rows.num_rows:
        return rows
    return rows.take(pa.array(np.sort(order[last])))
