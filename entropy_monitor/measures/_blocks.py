"""Cuts a `[B, H, R]` problem into blocks whose temporaries fit a limit."""

from __future__ import annotations

from collections.abc import Iterator


def blocks(
    batch: int,
    heads: int,
    rows: int,
    *,
    group: int,
    row_bytes: int,
    head_bytes: int,
    max_bytes: int,
) -> Iterator[tuple[slice, slice, slice]]:
    """Cut all (sequence, query head, row) triples into blocks, the largest that fit.

    A block holds whole groups of query heads that share one key head, or lies within one such
    group: either way its keys are used without repeating them. A single row of one head is never cut,
    so a limit below what that needs is exceeded.

    Args:
        batch: number of sequences B.
        heads: number of query heads H, a multiple of `group`.
        rows: number of query rows R.
        group: query heads to one key head.
        row_bytes: temporaries of one row of one query head.
        head_bytes: temporaries of one key head, whatever the number of rows.
        max_bytes: limit for one block.

    Yields:
        Slices of the batch, of the query heads and of the rows.
    """
    lines = max(1, (max_bytes - head_bytes) // row_bytes)
    r = max(1, min(rows, lines))
    h = max(1, min(group, lines // r))
    b = 1
    if h == group:
        whole = max(1, max_bytes // (head_bytes + r * group * row_bytes))
        key_heads = max(1, min(heads // group, whole))
        h = key_heads * group
        if h == heads:
            b = max(1, min(batch, whole // key_heads))
    for b0 in range(0, batch, b):
        for first in range(0, heads, max(h, group)):
            last = min(first + max(h, group), heads)
            for h0 in range(first, last, h):
                for r0 in range(0, rows, r):
                    yield (
                        slice(b0, min(b0 + b, batch)),
                        slice(h0, min(h0 + h, last)),
                        slice(r0, min(r0 + r, rows)),
                    )
