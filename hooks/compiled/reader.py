"""A watcher's part in compiled code: finds its attention when graphs are compiled, reads it when they run."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from entropy_monitor.guard import Guard
from entropy_monitor.hooks.calls import Receiver
from entropy_monitor.hooks.compiled import operator, switch
from entropy_monitor.hooks.compiled.arguments import join, path_of
from entropy_monitor.hooks.compiled.plan import Anchor, Plan, Thaw
from entropy_monitor.hooks.compiled.replay import read
from entropy_monitor.hooks.observer import Observer, Sightings, tell
from entropy_monitor.hooks.ownership import owner_of
from entropy_monitor.hooks.recall import Recall
from entropy_monitor.hooks.unread import UnreadError

_COMPILING = "following compiled code"


class CompiledReader:
    """Reads the attention of a model's compiled parts.

    Args:
        names: qualified name of every module.
        receiver: is told of each call.
        guard: keeps faults from the watched.
        sightings: where what is not measured is noted.
        patterns: names of modules in which every softmax counts as attention.
        settled: what was found out by looking at values.
        count: which call of a layer comes now in the forward that runs, given its number in the graph.
        skips: whether a forward is left out, given whether it has gradients and is in training mode.
        enter: called where compiled code is entered.
        island: called where a module's forward begins that is kept from being compiled.
        innermost: the innermost module whose forward runs around compiled code.
        observer: of the forward around compiled code, if there is one.
        unseen: functions that the compiler is not to look at.
    """

    def __init__(
        self,
        names: Mapping[nn.Module, str],
        receiver: Receiver,
        guard: Guard,
        sightings: Sightings,
        patterns: Sequence[str],
        settled: dict[Hashable, Any],
        count: Callable[[str, int], int],
        skips: Callable[[bool, bool], bool],
        enter: Callable[[], Callable[[], object] | None],
        island: Callable[[nn.Module], None],
        innermost: Callable[[], nn.Module | None],
        observer: Callable[[], Observer | Recall | None],
        unseen: Sequence[Any],
    ) -> None:
        self.names = names
        self._modules = {
            name: module for module, name in names.items()
        }  # of wrappers and what they wrap, the latter
        self._roots = [name for module, name in names.items() if not path_of(name, module)]
        self._receiver = receiver
        self._guard = guard
        self._sightings = sightings
        self.patterns = patterns
        self._settled = settled
        self._count = count
        self._skips = skips
        self.enter = enter
        self.island = island
        self.innermost = innermost
        self._observer = observer
        self._unseen = unseen
        self._by_memory: dict[int, list[str]] = {}
        self._expected: set[tuple[int, str]] = set()  # plans and layers of which the order was told

    def arm(self) -> None:
        """Read compiled code from now on."""
        if switch.available():
            operator.listen(self, self._read)
            switch.arm(self, self._unseen)

    def disarm(self) -> None:
        """Read no more."""
        operator.listen(self, None)
        switch.disarm(self)

    def refuse(self, layers: Iterable[str], why: str) -> None:
        """Note why layers are not read."""
        self._sightings.rejected.update((layer, why) for layer in layers if layer in self._modules)

    def fault(self, error: Exception) -> None:
        """Take note of an error of ours."""

        def again() -> None:
            raise error

        self._guard.run(_COMPILING, again)

    def seen(self) -> None:
        """Note that a forward runs in compiled code."""
        self._sightings.forwards += 1

    def _read(self, plan: Plan, tensors: Sequence[Tensor | None], sizes: Sequence[int]) -> None:
        self._guard.run(f"reading {plan.layer}", self._read_call, plan, tensors, sizes)

    def _read_call(self, plan: Plan, tensors: Sequence[Tensor | None], sizes: Sequence[int]) -> None:
        if torch._C._current_graph_task_id() != -1:
            return  # a checkpointed forward that runs again inside backward: already read
        layer = self._layer(plan, tensors)
        if layer is None:
            return
        if self._skips(plan.gradients, plan.training):
            return
        owner = self._modules[layer]
        renamed = _Renamed(path_of(plan.layer, owner), path_of(layer, owner))
        if plan.anchor is not None and (id(plan), layer) not in self._expected:
            self._expected.add((id(plan), layer))
            self._receiver.expect([(renamed.sibling(name), call) for name, call in plan.order])
        thaw = Thaw(
            tensors,
            sizes,
            lambda name: self._parameter(renamed(name)),
            lambda name: self._modules.get(renamed(name), owner),
            plan.parameters,
        )
        around = self._observer()
        lineage = None if around is None else around.lineage
        try:
            found = read(plan, thaw, self._settled, owner, layer, lineage)
        except UnreadError as error:
            self._sightings.rejected[layer] = str(error)
            return
        if found is not None:
            seen, projections = found
            projections.first_head, projections.ranks = plan.first_head, plan.ranks
            projections.sharded = plan.sharded
            if plan.anchor is None and around is not None and around.scopes:
                layer = self.names[owner_of(seen, around.scopes)]
            self._sightings.compiled.add(layer)
            tell(self._receiver, self._guard, layer, self._count(layer, plan.call), seen, projections)
            if around is not None and "output" not in projections.projections:
                around.await_output(layer, seen)

    def _layer(self, plan: Plan, tensors: Sequence[Tensor | None]) -> str | None:
        """The owner's name; None where the call belongs to another model."""
        if plan.anchor is not None:
            parameter = tensors[plan.anchor.slot.index]
            names = [] if parameter is None else self._parameter_names(parameter)
            return self._owner(plan, plan.anchor, names)
        around = self.innermost()
        if plan.around is None or around is None:
            return plan.layer if plan.layer in self._modules else None
        within = self.names[around] + plan.layer.removeprefix(plan.around)
        return within if within in self._modules else self.names[around]

    def _owner(self, plan: Plan, anchor: Anchor, names: Sequence[str]) -> str | None:
        """Of the modules that have the anchor just below them, the one that the plan names, or the first."""
        found = []
        for name in names:
            path = name.removesuffix(anchor.below)
            if path == name or (path and not path.endswith(".")):
                continue
            owners = [path.rstrip(".")] if path else self._roots
            kinds = {o: type(self._modules[o]).__name__ for o in owners if o in self._modules}
            found += [owner for owner, kind in kinds.items() if kind == anchor.kind]
        return plan.layer if plan.layer in found else next(iter(found), None)

    def _parameter_names(self, tensor: Tensor) -> list[str]:
        """The names of the parameter that lies where a tensor does; sharded training moves them about."""
        place = tensor.data_ptr()
        for name in self._by_memory.get(place, []):
            if (parameter := self._parameter(name)) is None or _place(parameter) != place:
                self._by_memory = {}
                break
        if place not in self._by_memory:
            self._by_memory = {}
            for module, name in self.names.items():
                for own, parameter in module._parameters.items():
                    if parameter is not None:
                        self._by_memory.setdefault(_place(parameter), []).append(join(name, own, module))
        return self._by_memory.get(place, [])

    def _parameter(self, name: str) -> nn.Parameter | None:
        module, _, own = name.rpartition(".")
        owners = [self._modules.get(n) for n in ([module] if module else self._roots)]
        return next((p for o in owners if o is not None and (p := o._parameters.get(own)) is not None), None)


class _Renamed:
    """From names within one layer to those within another; both by the paths that parameters have."""

    def __init__(self, old: str, new: str) -> None:
        self._old, self._new = old, new

    def __call__(self, name: str) -> str:
        if name == self._old:
            return self._new
        if self._old and not name.startswith(self._old + "."):
            return name
        return f"{self._new}.{name.removeprefix(self._old).lstrip('.')}".lstrip(".")

    def sibling(self, name: str) -> str:
        """The name of another layer of the same graph: what is before the common end of both changes."""
        old, new = self._old.split("."), self._new.split(".")
        while old and new and old[-1] == new[-1]:
            old, new = old[:-1], new[:-1]
        before = ".".join([*old, ""]) if old else ""
        if not name.startswith(before) or (not old and new):
            return name
        return ".".join([*new, ""]) + name.removeprefix(before) if new else name.removeprefix(before)


def _place(parameter: Tensor) -> int:
    local = getattr(parameter, "_local_tensor", parameter)
    return int(local.data_ptr())
