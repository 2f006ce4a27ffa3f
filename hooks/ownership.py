"""Whose an attention call is, and which projections made its q, k and v."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from entropy_monitor.hooks.calls import Role, Seen
from entropy_monitor.hooks.identify import (
    Found,
    find_projection,
    find_whole_projection,
    match_projection,
    settled_projection,
)
from entropy_monitor.hooks.projections import Projection
from entropy_monitor.hooks.scope import Scope

_HEAD_ATTRIBUTES = (
    "num_heads",
    "n_heads",
    "n_head",
    "num_attention_heads",
    "nhead",
    "heads",
    "nheads",
    "n_attn_heads",
    "h",
)
_TRIED_SCOPES = 2  # by value: the module that called attention, and the one around it


def declared_heads(scopes: Sequence[Scope]) -> int | None:
    """How many heads the running modules say they have, by the attribute names in common use."""
    for scope in reversed(scopes[-_TRIED_SCOPES:]):
        for name in _HEAD_ATTRIBUTES:
            value = getattr(scope.module, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return None


@dataclass(frozen=True)
class _Settled:
    """What the trial by value said in the first forward; `found` None: nothing agreed."""

    depth: int
    found: Found | None


class Ownership:
    """Resolves calls to owners; remembers what it had to find out by value.

    Args:
        names: qualified name of every module.
    """

    def __init__(self, names: Mapping[nn.Module, str]) -> None:
        self._names = names
        self._settled: dict[tuple[str, int, Role], _Settled] = {}

    def resolve(
        self, seen: Seen, scopes: Sequence[Scope], nth: Counter[str]
    ) -> tuple[nn.Module, dict[Role, Projection]]:
        """The owner of a call and the projections known for it.

        The owner is the module in whose forward the query projection ran, or else the innermost one.

        Args:
            seen: the call.
            scopes: the modules that are running, outermost first.
            nth: counts calls within this forward; advanced here.
        """
        innermost = scopes[-1].module
        if seen.projections or seen.inputs is None:
            return innermost, dict(seen.projections)
        place = self._names[innermost]
        number = nth[f"{place} "]  # apart from the owners' own counts: no name ends in a blank
        nth[f"{place} "] += 1
        group = max(1, seen.inputs.q.shape[1] // seen.inputs.k.shape[1])
        tensors: dict[Role, Tensor | None] = {
            "query": seen.inputs.q,
            "key": seen.inputs.k,
            "value": seen.value,
        }
        owner, projections = innermost, dict[Role, Projection]()
        for i, (role, tensor) in enumerate(tensors.items()):
            if tensor is None:
                continue
            hit = self._find(tensor, scopes) or self._try(tensor, scopes, (place, number, role), i, group)
            if hit is not None:
                projections[role] = hit[1]
                if role == "query":
                    owner = hit[0]
        return owner, projections

    def value_projection(self, values: Tensor, scopes: Sequence[Scope]) -> Projection | None:
        """W_V of hand-written attention, from the tensor that the attention weights are multiplied with."""
        for scope in reversed(scopes):
            if (projection := find_whole_projection(values, scope.linears)) is not None:
                return projection
        return None

    def is_folded(self, q: Tensor, scopes: Sequence[Scope], heads: int | None) -> bool:
        """Whether the first dimension of a `[N, T, D]` query holds batch times heads."""
        if q.dim() != 3 or not heads or heads == 1 or q.shape[0] % heads:
            return False
        if self._find(q.unflatten(0, (-1, heads)), scopes) is not None:
            return True
        if self._find(q[:, None], scopes) is not None:
            return False
        widths = {linear.shape[-1] for scope in scopes[-_TRIED_SCOPES:] for linear in scope.linears}
        return q.shape[-1] not in widths

    def _find(self, tensor: Tensor, scopes: Sequence[Scope]) -> tuple[nn.Module, Projection] | None:
        for scope in reversed(scopes):
            if (projection := find_projection(tensor, scope.linears)) is not None:
                return scope.module, projection
        return None

    def _try(
        self,
        tensor: Tensor,
        scopes: Sequence[Scope],
        key: tuple[str, int, Role],
        role: int,
        group: int,
    ) -> tuple[nn.Module, Projection] | None:
        if key not in self._settled:
            self._settled[key] = self._settle(tensor, scopes, role, group)
        settled = self._settled[key]
        if settled.found is None or settled.depth > len(scopes):
            return None
        scope = scopes[-settled.depth]
        projection = settled_projection(settled.found, tensor, scope.linears)
        return None if projection is None else (scope.module, projection)

    def _settle(self, tensor: Tensor, scopes: Sequence[Scope], role: int, group: int) -> _Settled:
        for depth in range(1, min(_TRIED_SCOPES, len(scopes)) + 1):
            found = match_projection(tensor, scopes[-depth].linears, role, group)
            if found is not None:
                return _Settled(depth, found)
        return _Settled(0, None)
