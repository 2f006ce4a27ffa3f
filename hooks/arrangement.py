"""Which leading dimensions of a query are sequences, and which are heads.

Heads lie within the output features of the query projection, sequences among its rows: a view of that
output shows by its strides which is which, also where heads are folded into the batch or split into
groups. Copies fall back on the number of heads that the features, or the module's attributes, tell.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

from torch import Tensor

from entropy_monitor.hooks.features import is_inner
from entropy_monitor.hooks.lineage import Joined, Origin
from entropy_monitor.hooks.linears import LinearCall
from entropy_monitor.hooks.rows import has_rows_of
from entropy_monitor.hooks.unread import HeadsUntoldError


@dataclass(frozen=True)
class Arrangement:
    """How `[…, T, D]` becomes `[B, H, T, D]`.

    Attributes:
        sequences: leading dimensions that run over sequences, in order.
        heads: leading dimensions that run over heads, the slowest first.
        folded: heads within the first leading dimension; 0 where they are not folded. What other leading
            dimensions there are, such as windows, run over sequences.
        heads_outside: whether that dimension runs over heads first, sequences within.
    """

    sequences: tuple[int, ...]
    heads: tuple[int, ...]
    folded: int = 0
    heads_outside: bool = False

    def alternatives(self) -> list[Arrangement]:
        """The other orders in which the same dimensions may run."""
        if self.folded:
            return [replace(self, heads_outside=not self.heads_outside)]
        return [replace(self, heads=order) for order in permutations(self.heads) if order != self.heads]

    def apply(self, tensor: Tensor) -> Tensor:
        """`[…, X, Y]` as `[B, H, X, Y]`; a view wherever possible."""
        if self.folded:
            n = tensor.shape[0]
            split = (self.folded, n // self.folded) if self.heads_outside else (n // self.folded, self.folded)
            tensor = tensor.view(*split, *tensor.shape[1:]).movedim(0 if self.heads_outside else 1, -3)
            return tensor.flatten(0, -4)
        order = (*self.sequences, *self.heads)
        tensor = tensor.permute(*order, -2, -1)
        n = len(self.sequences)
        tensor = tensor.flatten(n, -3) if len(self.heads) > 0 else tensor.unsqueeze(n)
        return tensor.flatten(0, n - 1) if n > 0 else tensor.unsqueeze(0)

    def apply_to_keys(self, keys: Tensor, queries: Tensor) -> Tensor:
        """`[…, S, D]` keys as `[B, K, S, D]`: like `apply`, key heads that queries share kept once."""
        lead = list(queries.shape[:-2])
        shared = [keys.shape[d] == 1 < lead[d] for d in self.heads]
        if not self.folded and shared == sorted(shared):  # what is shared is the innermost
            for d, alone in zip(self.heads, shared, strict=True):
                lead[d] = 1 if alone else lead[d]
        return self.apply(keys.expand(*lead, *keys.shape[-2:]))


def possible_arrangements(
    q: Tensor, root: LinearCall | None, origin: Origin | None, heads: int | None
) -> list[Arrangement]:
    """The arrangements that a query may have, the likeliest first; one where memory tells.

    Args:
        q: `[…, T, D]`.
        root: the linear map whose output it is a view of, if it is one.
        origin: the linear map that it was made from, by whatever way.
        heads: how many there are, where the module's attributes tell.
    """
    rows = None
    if isinstance(origin, Joined):
        origin = None
    if origin is not None:
        count, head_size = origin.features.count, q.shape[-1]
        rows = origin.linear.shape.numel() // origin.linear.features
        told = count // head_size if count % head_size == 0 else 1
        # Where attention runs over features, the last dimension tells nothing: the module's word goes first.
        declared = q.dim() == 4 and heads is not None and q.shape[1] == heads
        heads = heads if declared or not (told > 1 or heads is None or q.dim() == 3) else told
    arrangement = arrange(q, root, heads, rows)
    if origin is None or root is not None or arrangement.folded == q.shape[0]:
        return [arrangement]
    others = _other_places(q, arrangement, heads)
    return [arrangement, *arrangement.alternatives(), *others]


def _other_places(q: Tensor, found: Arrangement, heads: int | None) -> list[Arrangement]:
    """Heads in other leading dimensions that are as large, such as that of windows."""
    n = q.dim() - 2
    if n < 3 or found.folded:
        return []
    alike = [i for i in range(1, n) if q.shape[i] == heads and (i,) != found.heads]
    return [Arrangement(tuple(i for i in range(n) if i != d), (d,)) for d in alike]


def choose(
    possible: list[Arrangement], q: Tensor, origin: Origin | None, settled: dict[Hashable, Any]
) -> Arrangement:
    """The one that the values of a query speak for: a copy no longer shows in which order heads lie.

    Args:
        possible: see `possible_arrangements`.
        q: `[…, T, D]`.
        origin: where it comes from.
        settled: what was found out before; values are looked at once, for that waits for the device.

    Raises:
        HeadsUntoldError: if they speak for none.
    """
    if len(possible) == 1 or origin is None:
        return possible[0]
    question = (origin.linear.module, origin.features, possible[0])
    if question not in settled:
        found = (a for a in possible if has_rows_of(a.apply(q), origin))
        settled[question] = next(found, None)
    chosen: Arrangement | None = settled[question]
    if chosen is None:
        heads = possible[0].apply(q).shape[1]
        raise HeadsUntoldError(
            f"queries of shape {list(q.shape)} hold {heads} heads among their leading dimensions, in an "
            "order that their values do not tell: no order gives the rows that the query projection made. "
            "Keep heads in a dimension of their own, [batch, heads, tokens, head size], to have them read."
        )
    return chosen


def arrange(queries: Tensor, root: LinearCall | None, heads: int | None, rows: int | None) -> Arrangement:
    """The arrangement of a query `[…, T, D]`.

    Args:
        queries: the query.
        root: the linear map whose output it is a view of, if it is one.
        heads: how many there are, where the projection's features or the module's attributes tell.
        rows: how many rows the query projection had, if that is known.
    """
    lead, tokens = queries.shape[:-2], queries.shape[-2]
    n = len(lead)
    if root is not None:
        inner = [i for i in range(n) if is_inner(lead[i], queries.stride(i), root)]
        if inner:
            inner.sort(key=queries.stride, reverse=True)
            width = root.features * root.feature_stride
            if n == 1 and lead[0] * queries.stride(0) > width:
                return Arrangement((), (), folded=width // queries.stride(0))
            return Arrangement(tuple(i for i in range(n) if i not in inner), tuple(inner))
    if n == 0:
        return Arrangement((), ())
    if n == 1:
        divides = heads is not None and heads > 1 and lead[0] % heads == 0
        # As many rows as the map's are one head; there may be more, such as a class token's.
        if divides and heads is not None and (rows is None or lead[0] * tokens != rows):
            return Arrangement((), (), folded=heads)
        return Arrangement((0,), ())
    if n == 2:
        swapped = heads is not None and heads > 1 and lead[1] != heads and lead[0] == heads
        if swapped:
            return Arrangement((1,), (0,))
        other = heads is not None and heads > 1 and lead[1] != heads and lead[0] % heads == 0
        if other and heads is not None and rows is not None and lead.numel() * tokens == rows * heads:
            return Arrangement((), (), folded=heads)
        return Arrangement((0,), (1,))
    alone = [i for i in range(1, n) if lead[i] == heads]
    if len(alone) == 1 and lead[1:].numel() != heads:  # heads outside of blocks of tokens
        return Arrangement(tuple(i for i in range(n) if i != alone[0]), (alone[0],))
    first = n - 1
    for i in range(n - 1, 0, -1):
        if lead[i:].numel() == heads:
            first = i
            break
    return Arrangement(tuple(range(first)), tuple(range(first, n)))
