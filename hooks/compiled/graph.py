"""What attention a graph holds that Dynamo captured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from entropy_monitor.guard import Guard
from entropy_monitor.hooks.calls import AttentionCall, Role, Seen
from entropy_monitor.hooks.compiled.sites import RecordingSite
from entropy_monitor.hooks.observer import Observer, Sightings
from entropy_monitor.hooks.ownership import first_head, owner_of
from entropy_monitor.hooks.projections import Projection
from entropy_monitor.hooks.site import Site
from entropy_monitor.hooks.sources import Source
from entropy_monitor.hooks.unread import UnreadError


@dataclass
class GraphCall:
    """An attention call of a graph.

    Attributes:
        node: that computes it.
        source: name of the source.
        args: of the call, on fakes, where they are not those of the node.
        answers: to the source's questions.
        heads: see `Site`.
        by_hand: see `Site`.
        owner: the module whose attention it is.
        layer: its name.
        call: nth call of this owner in the graph.
        later: W_V and W_O, as far as they are known.
        first_head: see `AttentionCall`.
        ranks: see `AttentionCall`.
        sharded: see `AttentionCall`.
        autocast: device type and dtype of the autocast around it, if there is one.
    """

    node: fx.Node
    source: str
    args: tuple[Any, ...] | None
    answers: list[tuple[str, Any]]
    heads: int | None
    by_hand: bool
    owner: nn.Module
    layer: str
    call: int
    later: dict[Role, Projection]
    first_head: int = 0
    ranks: tuple[int, ...] = ()
    sharded: bool = False
    autocast: tuple[str, torch.dtype] | None = None


def _autocast(seen: Seen) -> tuple[str, torch.dtype] | None:
    rows = seen.logits if seen.inputs is None else seen.inputs.q
    device = "cpu" if rows is None else rows.device.type
    return (device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None


@dataclass
class Traced:
    """One graph that was run.

    Attributes:
        module: the graph's.
        parent: the graph around it, if there is one.
        call: the node there that runs it.
        nodes: which node made which tensor, by identity.
        kept: these tensors.
        calls: what attention it holds.
        split: nodes of DTensors; what is known of them is known of the parts that this process holds.
    """

    module: fx.GraphModule
    parent: Traced | None = None
    call: fx.Node | None = None
    nodes: dict[int, fx.Node] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)
    calls: list[GraphCall] = field(default_factory=list)
    split: set[fx.Node] = field(default_factory=set)

    @property
    def graph(self) -> fx.Graph:
        """Its nodes."""
        return self.module.graph


class GraphObserver(Observer):
    """Collects the attention calls of a graph instead of reading them."""

    def __init__(self, names: Mapping[nn.Module, str], sightings: Sightings, patterns: Sequence[str]) -> None:
        super().__init__(names, self, Guard(), sightings, patterns, {})
        self.guard = self._guard
        self.at: tuple[Traced, fx.Node] | None = None
        self.order: list[tuple[str, int]] = []
        self._by_layer: dict[str, GraphCall] = {}

    def expect(self, calls: Sequence[tuple[str, int]]) -> None:
        """See `Receiver`; never called here."""

    def attention(self, call: AttentionCall) -> None:
        """See `Receiver`; never called here."""

    def projection(self, layer: str, role: Role, projection: Projection) -> None:
        """See `Receiver`."""
        call = self._by_layer.get(layer)
        if call is not None:
            call.later.setdefault(role, projection)

    def retract(self, layer: str, role: Role) -> None:
        """See `Receiver`."""
        call = self._by_layer.get(layer)
        if call is not None:
            call.later.pop(role, None)

    def sync(self, modules: Sequence[nn.Module]) -> None:
        """Have just these modules running, the outermost first."""
        running = [scope.module for scope in self.scopes]
        same = 0
        while same < min(len(running), len(modules)) and running[same] is modules[same]:
            same += 1
        for _ in running[same:]:
            self.leave()
        for module in modules[same:]:
            self.enter(module)

    def leave(self) -> None:
        """The innermost forward ends; its tensors are kept until the whole graph was read."""
        self.scopes.pop()

    def _site(self) -> Site:
        site = super()._site()
        return RecordingSite(self._trace, site.heads, site.by_hand)

    def _found(self, source: Source, args: tuple[Any, ...], seen: Seen, site: Site) -> None:
        if self.at is None or not isinstance(site, RecordingSite):
            return
        if seen.value is not None:
            site.origin_of(seen.value)  # asked again when the call is read
        traced, node = self.at
        owner = owner_of(seen, self.scopes)
        layer = self._names[owner]
        split = self._take_sharded()
        origin = seen.origins.get("query")
        if origin is not None:  # it comes first: others may be as wide
            split.sort(key=lambda linear: linear is not origin.linear)
        try:
            first = first_head(seen, None, split)
        except UnreadError as error:
            self._sightings.rejected[layer] = str(error)
            return
        call = GraphCall(
            node,
            source.NAME,
            None if source.FUNCTIONS else args,
            site.answers,
            site.heads,
            site.by_hand,
            owner,
            layer,
            self.count(layer),
            {},
            first,
            tuple(sorted(self._ranks)),
            bool(split),
            _autocast(seen),
        )
        traced.calls.append(call)
        self.order.append((layer, call.call))
        self._by_layer[layer] = call
        self.await_output(layer, seen)
