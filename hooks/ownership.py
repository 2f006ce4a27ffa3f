"""Whose an attention call is, and which projections made its q, k and v."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from entropy_monitor.hooks.calls import Role, Seen
from entropy_monitor.hooks.lineage import Origin
from entropy_monitor.hooks.linears import LinearCall
from entropy_monitor.hooks.projections import Projection
from entropy_monitor.hooks.provenance import projection_of
from entropy_monitor.hooks.scope import Scope
from entropy_monitor.hooks.site import Site

_READ: tuple[Role, ...] = ("query", "key")


def owner_of(seen: Seen, scopes: Sequence[Scope]) -> nn.Module:
    """The module in whose forward the query projection ran, or else the innermost one that is running."""
    origin = seen.origins.get("query")
    linear = None if origin is None else origin.linear
    return (linear.scope.running(scopes) if isinstance(linear, LinearCall) else scopes[-1]).module


def projections_of(seen: Seen, site: Site) -> dict[Role, Projection]:
    """The projections of q, k and v that are known for a call."""
    found = dict(seen.projections)
    for role in _READ:
        origin = seen.origins.get(role)
        if origin is not None:
            tensor = seen.tensors[role]
            projection = projection_of(tensor, origin, site.root_of(tensor))
            if projection is not None:
                found[role] = projection
    if seen.value is not None and (origin := site.origin_of(seen.value)) is not None:
        found["value"] = whole_projection(origin)
    return found


def whole_projection(origin: Origin) -> Projection:
    """The weights behind a tensor, all heads together."""
    linear = origin.linear
    return Projection(
        linear.weight, linear.bias, origin.features.whole(), None, None, parameters=linear.parameters
    )
