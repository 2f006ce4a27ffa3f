"""What a message holds, written in its metadata: so that it can be found without decoding it.

Most batches hold whole records, one measured step after another with the same heads in the same order. Such
a batch carries a note: how many rows a step has, a fingerprint of their order, and the steps. Who wants one
column of a long run then decodes that column and nothing else.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from entropy_monitor.records import Table

NOTE_KEY = "entropy_monitor.contents"
_NOTE = re.compile(rb"EMHOLDS rows=(\d+) order=([0-9a-f]{8}) steps=(-?\d+(?:,-?\d+)*)")


@dataclass(frozen=True)
class Contents:
    """What a batch holds.

    Attributes:
        rows: of each step.
        order: a fingerprint of the rows' places, equal where they are.
        steps: one for each record, in the order of writing.
    """

    rows: int
    order: int
    steps: tuple[int, ...]


def place_columns(table: Table) -> tuple[str, ...]:
    """The columns that say of which part of the model a row is."""
    return tuple(name for name in (*table.key, "layer_index") if name != "step" and name in table.names)


def note_of(table: Table, batches: Sequence[pa.RecordBatch]) -> str:
    """The note for a message of these batches; empty where they are not records of one order."""
    places = place_columns(table)
    if "layer_index" not in places or not batches:
        return ""
    rows, orders, steps = batches[0].num_rows, set(), []
    for batch in batches:
        of_batch = batch.column("step").to_numpy()
        if batch.num_rows != rows or (of_batch != of_batch[0]).any():
            return ""
        orders.add(fingerprint_of([batch.column(name) for name in places]))
        steps.append(str(of_batch[0]))
    if len(orders) > 1:
        return ""
    return f"EMHOLDS rows={rows} order={orders.pop():08x} steps={','.join(steps)}"


def read_note(metadata: bytes) -> Contents | None:
    """The note in a message's metadata, None where there is none."""
    match = _NOTE.search(metadata)
    if match is None:
        return None
    try:
        rows, steps = int(match[1]), tuple(map(int, match[3].split(b",")))
    except ValueError:  # too many digits
        return None
    if max(rows, *map(abs, steps)) >= 1 << 63:
        return None
    return Contents(rows, int(match[2], 16), steps)


def fingerprint_of(columns: Sequence[pa.Array]) -> int:
    """A CRC-32 of columns of texts and whole numbers, without nulls."""
    crc = 0
    for column in columns:
        if pa.types.is_string(column.type):
            _, offsets, text = column.buffers()
            ends = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
            crc = zlib.crc32(ends - ends[0], crc)
            crc = zlib.crc32(memoryview(text or b"")[ends[0] : ends[-1]], crc)
        else:
            crc = zlib.crc32(column.to_numpy(), crc)
    return crc
