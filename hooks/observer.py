"""Reads the torch functions of a watched forward: which are attention, projections, values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from entropy_monitor.guard import Guard
from entropy_monitor.hooks.calls import AttentionCall, Receiver, Role, Seen
from entropy_monitor.hooks.features import Features
from entropy_monitor.hooks.lineage import Lineage, Origin
from entropy_monitor.hooks.linears import LinearCall
from entropy_monitor.hooks.ownership import Identified, first_head, identify, owner_of, whole_projection
from entropy_monitor.hooks.projections import Projection
from entropy_monitor.hooks.recall import Followed, Path, path_of, tells_all
from entropy_monitor.hooks.scope import NEAR, Scope, declared_heads
from entropy_monitor.hooks.site import EagerSite, Site
from entropy_monitor.hooks.sources import ATTENTION, Source, normalised, source_of
from entropy_monitor.hooks.sources.normalised import Activations
from entropy_monitor.hooks.trace import Trace, Weighted
from entropy_monitor.hooks.unread import UnreadError


@dataclass
class Sightings:
    """What was seen beside figures: for `describe`, and for the error that a model without attention gets.

    Attributes:
        forwards: how many ran.
        skipped: how many were left out, by reason.
        rejected: why a layer's attention is not read, by layer.
        compiled: layers whose attention was read inside compiled code.
        ran: modules whose forward ran eagerly.
    """

    forwards: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    rejected: dict[str, str] = field(default_factory=dict)
    compiled: set[str] = field(default_factory=set)
    ran: set[str] = field(default_factory=set)


@dataclass
class _Awaited:
    """An attention output whose projection is still to come.

    Attributes:
        layer: whose output.
        elements: of it; 0 where it is not known yet.
        followed: whether the trace follows it; else the number of elements has to tell.
    """

    layer: str
    elements: int
    followed: bool = False


class Observer:
    """Reads one forward.

    Args:
        names: qualified name of every module.
        receiver: is told of each call.
        guard: keeps a fault of one layer to that layer.
        sightings: where what is not measured is noted.
        patterns: names of modules in which every softmax counts as attention.
        settled: see `Lineage`.

    Attributes:
        scopes: the forwards that are running, of modules that are no torch layers.
        followed: whose each attention call is, for forwards that need not be followed.
    """

    follows = True

    def __init__(
        self,
        names: Mapping[nn.Module, str],
        receiver: Receiver,
        guard: Guard,
        sightings: Sightings,
        patterns: Sequence[str],
        settled: dict[Hashable, Any],
    ) -> None:
        self.scopes: list[Scope] = []
        self.followed = Followed()
        self._names = names
        self._receiver = receiver
        self._guard = guard
        self._sightings = sightings
        self._patterns = patterns
        self._trace = Trace(settled)
        self._activations = Activations(self._trace)
        self._calls: Counter[str] = Counter()
        self._places: Counter[Path] = Counter()
        self._awaited: _Awaited | None = None
        self._outputs: dict[str, LinearCall] = {}
        self._sharded: list[LinearCall] = []
        self._ranks: set[int] = set()

    @property
    def lineage(self) -> Lineage:
        """Where the tensors of this forward come from."""
        return self._trace.lineage

    def enter(self, module: nn.Module) -> None:
        """A module's forward begins."""
        self.scopes.append(Scope(module, self.scopes[-1] if self.scopes else None))

    def leave(self) -> None:
        """The innermost forward ends."""
        if self.scopes:
            self.scopes.pop().close()

    def reject(self, why: str) -> None:
        """Note why attention of the innermost module is not read."""
        self.followed.suffices = False
        if self.scopes:
            self._sightings.rejected[self._names[self.scopes[-1].module]] = why

    @torch.no_grad()
    def before(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Attention itself, before it runs: it may work in place."""
        with torch._C.DisableTorchFunction():
            self._awaited = None
            self._read(source_of(func), args, kwargs)

    def _read(self, source: Source, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        site = self._site()
        try:
            seen = source.read(args, kwargs, site)
        except UnreadError as error:
            self.reject(str(error))
            return
        if seen is None:
            self.followed.others.add(path_of(self.scopes))
        else:
            self.followed.suffices &= tells_all(source, args, kwargs)
            self._take_back_outputs(seen)
            self._found(source, args, seen, site)

    def _site(self) -> Site:
        by_hand = any(
            fnmatchcase(self._names[scope.module], pattern)
            for scope in self.scopes
            for pattern in self._patterns
        )
        return EagerSite(self._trace, declared_heads(self.scopes), by_hand)

    def _found(self, source: Source, args: tuple[Any, ...], seen: Seen, site: Site) -> None:  # noqa: ARG002
        owner = owner_of(seen, self.scopes)
        layer = self._names[owner]
        found = identify(seen, site, owner, layer)
        split = self._take_sharded()
        found.sharded, found.ranks = bool(split), tuple(sorted(self._ranks))
        try:
            found.first_head = first_head(seen, found.projections.get("query"), split)
        except UnreadError as error:
            self._sightings.rejected[layer] = str(error)
            self.followed.suffices = False
            return
        self._note(seen, layer, found)
        tell(self._receiver, self._guard, layer, self._next_call(layer), seen, found)
        self.await_output(layer, seen)

    def _note(self, seen: Seen, layer: str, found: Identified) -> None:
        """For forwards that need not be followed."""
        path = path_of(self.scopes)
        self.followed.note((path, self._places[path]), seen, layer, found.first_head)
        self._places[path] += 1
        self.followed.suffices &= not found.sharded and found.fault is None

    def _take_sharded(self) -> list[LinearCall]:
        """The maps near the attention that is read now of whose weights a process holds a part."""
        near = self.scopes[-NEAR:]
        found = [linear for linear in self._sharded if linear.scope.running(self.scopes) in near]
        self._sharded.clear()
        return found

    def count(self, layer: str) -> int:
        """A call in compiled code: which of a layer's in this forward it is, from 0."""
        self.followed.suffices = False
        return self._next_call(layer)

    def _next_call(self, layer: str) -> int:
        call = self._calls[layer]
        self._calls[layer] += 1
        return call

    def await_output(self, layer: str, seen: Seen) -> None:
        """Take the linear map that is applied to the output of a call for its W_O."""
        if "output" not in seen.projections:
            self._awaited = _Awaited(layer, seen.output_size)

    @torch.no_grad()
    def after(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor, module: nn.Module
    ) -> None:
        """What a function made: attention weights, a linear map's output, a product, or made of these."""
        with torch._C.DisableTorchFunction():
            if func in ATTENTION:  # its result comes from attention, no longer from a projection
                if source_of(func).GIVES_WEIGHTS:
                    if self._awaited is not None:
                        self._trace.note_weights(result, self._awaited.layer)
                else:
                    self._follow_output(result)
                return
            attended = self._activations.ran(func, args, kwargs, result)
            if attended is not None:
                self._awaited = None
                self._read(normalised, attended, {})
                self._follow_output(result)
            event = self._trace.ran(func, args, kwargs, result, self.scopes[-1], module)
            if isinstance(event, LinearCall):
                if event.shard is not None and event.shard.dims:
                    self._sharded.append(event)
                    self._ranks.update(event.shard.ranks)
                self._maybe_output(event)
            elif event is not None:
                self._note_values(event)
                self._trace.note_output(result, event.layer)

    def _follow_output(self, result: Tensor) -> None:
        if self._awaited is not None:
            self._awaited.followed = True
            self._trace.note_output(result, self._awaited.layer)

    def _note_values(self, event: Weighted) -> None:
        """The operand of a layer's attention weights tells W_V."""
        if self._awaited is not None and self._awaited.layer == event.layer:
            self._awaited.followed = True
        origin = self._trace.lineage.origin_of(event.values)
        value = None if origin is None else whole_projection(origin)
        if value is not None:
            self._tell_later(event.layer, "value", value)

    def _maybe_output(self, linear: LinearCall) -> None:
        """The first linear map of an attention's output is its W_O, with what is added to it (an adapter)."""
        x, awaited = linear.input, self._awaited
        if x is None:
            return
        layer = self._trace.output_of(x)
        if layer is None and awaited is not None and not awaited.followed and x.numel() == awaited.elements:
            layer, self._awaited = awaited.layer, None
        if layer is None or (layer in self._outputs and not linear.added):
            return
        if layer in self._outputs:
            self._guard.run(f"reading {layer}", self._receiver.retract, layer, "output")
        self._outputs[layer] = linear
        every = Features(0, ((linear.features, 1),))
        whole = whole_projection(Origin(linear, every), latent=False) if linear.added else linear.whole()
        if whole is not None:
            self._tell_later(layer, "output", whole)

    def _take_back_outputs(self, seen: Seen) -> None:
        """What makes queries or keys is no output projection of the attention before it."""
        makers = [origin.linear for origin in seen.origins.values() if origin is not None]
        for layer, linear in list(self._outputs.items()):
            if any(linear is maker for maker in makers):
                self._guard.run(f"reading {layer}", self._receiver.retract, layer, "output")

    def _tell_later(self, layer: str, role: Role, projection: Projection) -> None:
        self._guard.run(f"reading {layer}", self._receiver.projection, layer, role, projection)


def tell(receiver: Receiver, guard: Guard, layer: str, call: int, seen: Seen, identified: Identified) -> None:
    """Tell a receiver of a call; a layer that cannot be measured must not take the others with it.

    Args:
        receiver: who is told.
        guard: keeps its faults.
        layer: the owner's name.
        call: nth call of this owner in this forward.
        seen: what the source saw.
        identified: the projections, by role, and why others are not known.
    """
    part, found = f"reading {layer}", identified.projections
    attention = AttentionCall(
        layer,
        call,
        seen.source,
        seen.inputs,
        seen.logits,
        found.get("query"),
        found.get("key"),
        seen.extra_keys,
        seen.attention,
        seen.weights,
        identified.reasons,
        identified.first_head,
        identified.ranks,
        identified.sharded,
    )
    guard.run(part, receiver.attention, attention)
    if identified.fault is not None:
        guard.run(f"projections of {layer}", _raise, identified.fault)
    for role in _LATER:
        if role in found:
            guard.run(part, receiver.projection, layer, role, found[role])


def _raise(error: Exception) -> None:
    raise error


_LATER: tuple[Role, ...] = ("value", "output")
