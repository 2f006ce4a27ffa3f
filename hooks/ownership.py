"""Whose an attention call is, and which projections made its q, k and v."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.hooks.calls import Role, Seen
from entropy_monitor.hooks.latent import composed, own_parameters, through
from entropy_monitor.hooks.lineage import Joined, Origin
from entropy_monitor.hooks.linears import LinearCall, LinearMap
from entropy_monitor.hooks.projections import Projection
from entropy_monitor.hooks.provenance import check_here, given_projection, projection_of
from entropy_monitor.hooks.registry import Projections, registered_projections
from entropy_monitor.hooks.scope import Scope
from entropy_monitor.hooks.sharding import first_of
from entropy_monitor.hooks.site import EagerSite, Site
from entropy_monitor.hooks.unread import UnreadError
from entropy_monitor.hooks.verdicts import NoProjectionError, Verdicts

_READ: dict[Role, str] = {"query": "queries", "key": "keys"}
_NO_MAP = "{} come from no linear map of this forward"


@dataclass
class Identified:
    """What is known of a call's projections.

    Attributes:
        projections: by role.
        reasons: why there is none, for queries and keys.
        fault: what is wrong with what the user registered.
        first_head: see `AttentionCall`.
        ranks: see `AttentionCall`.
        sharded: see `AttentionCall`.
    """

    projections: dict[Role, Projection] = field(default_factory=dict)
    reasons: dict[Role, str] = field(default_factory=dict)
    fault: ConfigurationError | None = None
    first_head: int = 0
    ranks: tuple[int, ...] = ()
    sharded: bool = False


def owner_of(seen: Seen, scopes: Sequence[Scope]) -> nn.Module:
    """The module in whose forward the query projection ran, or else the innermost one that is running."""
    origin = seen.origins.get("query")
    linear = None if origin is None else origin.linear
    return (linear.scope.running(scopes) if isinstance(linear, LinearCall) else scopes[-1]).module


def identify(seen: Seen, site: Site, owner: nn.Module | None = None, name: str = "") -> Identified:
    """The projections of q, k and v, or why they are not known. May wait for the device, once a layer.

    Args:
        seen: the call.
        site: where it was made.
        owner: whose attention it is, for what was registered for it.
        name: the owner's qualified name.
    """
    found = Identified(dict(seen.projections))
    verdicts = Verdicts(site.settle("verdicts on projections", dict))
    given = None
    if owner is not None:
        try:
            given = registered_projections(owner, name)
        except ConfigurationError as error:
            found.fault = error
            found.reasons = dict.fromkeys(_READ, str(error))
            for role in _READ:
                found.projections.pop(role, None)
    one_input = _share_latent(seen.origins.get("query"), seen.origins.get("key"))
    for role in _READ if found.fault is None else ():
        if role in found.projections and given is None:
            continue
        try:
            found.projections[role] = _find(role, seen, site, verdicts, given, owner, not one_input)
        except NoProjectionError as error:
            found.projections.pop(role, None)
            found.reasons[role] = str(error).format(_READ[role])
    if seen.value is not None and (origin := site.origin_of(seen.value)) is not None:
        value = whole_projection(origin, latent=not one_input)
        if value is not None:
            found.projections["value"] = value
    return found


def first_head(seen: Seen, query: Projection | None, linears: Sequence[LinearMap]) -> int:
    """Number of a call's first query head among those of all processes.

    Args:
        seen: the call.
        query: where its queries come from, if that is known.
        linears: linear maps with sharded weights, one of which may have made the queries.

    Raises:
        UnreadError: heads are split over processes, and which ones are here cannot be told.
    """
    if query is not None and query.layout.heads == seen.heads:
        weight, shard = query.weight, query.shard
    else:
        source = next((x for x in linears if seen.width in (x.features, x.all_features)), None)
        if source is None and linears:
            raise UnreadError(
                "weights are split over processes, and no query projection tells which of the heads are here"
            )
        if source is None or source.features != seen.width:  # all are here
            return 0
        weight, shard = source.weight, source.shard
    first = 0 if shard is None else first_of(seen.heads, weight, shard)
    if first is None:
        raise UnreadError("weights are split over processes in the middle of a head")
    return first


def _find(
    role: Role,
    seen: Seen,
    site: Site,
    verdicts: Verdicts,
    given: Projections | None,
    owner: nn.Module | None,
    latent: bool,
) -> Projection:
    tensor, origin = seen.tensors.get(role), seen.origins.get(role)
    if given is not None:
        weight, bias = (given.query, given.query_bias) if role == "query" else (given.key, given.key_bias)
        if tensor is None and seen.inputs is not None:
            tensor = seen.inputs.q if role == "query" else seen.inputs.k
        if tensor is None:
            raise NoProjectionError("{} are not known beside their products")
        known = seen.projections.get(role)
        root = None if origin is None else site.root_of(tensor)
        question = ("registered", owner, role)
        return given_projection(tensor, weight, bias, origin, root, verdicts, question, known)
    if tensor is None:
        raise NoProjectionError("{} are not known beside their products")
    if origin is None:
        raise NoProjectionError(_reason(site, tensor) or _NO_MAP)
    return projection_of(tensor, origin, site.root_of(tensor), verdicts, latent=latent)


def whole_projection(origin: Origin, *, latent: bool = True) -> Projection | None:
    """The weights behind a tensor, all heads together; None where this process does not have them.

    Args:
        origin: of the tensor.
        latent: whether a chain of maps counts as one.
    """
    linear = origin.linear
    try:
        check_here(linear)
    except NoProjectionError:
        return None
    weight, bias = composed(linear)
    found = Projection(
        weight,
        bias,
        origin.features.whole(),
        None,
        None,
        parameters=own_parameters(linear),
        shard=linear.shard,
    )
    return through(found, linear) if latent else found


def _share_latent(query: Origin | None, key: Origin | None) -> bool:
    """Whether q and k are made from one bottleneck: that is the attention's input then, and no chain."""
    if query is None or key is None or isinstance(query, Joined) or isinstance(key, Joined):
        return False
    a, b = query.linear.latent, key.linear.latent
    return a is not None and b is not None and a.linear is b.linear and a.features == b.features


def _reason(site: Site, tensor: Any) -> str | None:
    return site.trace.lineage.reason_of(tensor) if isinstance(site, EagerSite) else None
