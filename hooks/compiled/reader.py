"""A watcher's part in compiled code: finds its attention when graphs are compiled, reads it when they run."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from entropy_monitor.guard import Guard
from entropy_monitor.hooks.compiled import operator, switch
from entropy_monitor.hooks.compiled.graph import GraphObserver, Traced, read_graph
from entropy_monitor.hooks.compiled.plan import Anchor, Plan, Thaw
from entropy_monitor.hooks.compiled.replay import read
from entropy_monitor.hooks.compiled.rewrite import insert, join, recompile
from entropy_monitor.hooks.observer import Receiver, Sightings, tell
from entropy_monitor.hooks.sources import python_functions
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
        innermost: the innermost module whose forward runs around compiled code.
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
        enter: switch.Enter,
        innermost: Callable[[], nn.Module | None],
    ) -> None:
        self._names = names
        self._modules = {name: module for module, name in reversed(list(names.items()))}
        self._receiver = receiver
        self._guard = guard
        self._sightings = sightings
        self._patterns = patterns
        self._settled = settled
        self._count = count
        self._skips = skips
        self._enter = enter
        self._innermost = innermost
        self._by_memory: dict[int, list[str]] = {}

    def arm(self) -> None:
        """Read compiled code from now on."""
        if switch.available():
            operator.listen(self, self._read)
            switch.arm(self, self._rewrite, self._enter)

    def disarm(self) -> None:
        """Read no more."""
        operator.listen(self, None)
        switch.disarm(self)

    def _rewrite(
        self, module: fx.GraphModule, inputs: Sequence[Any], graph: Any
    ) -> Callable[[], None] | None:
        return self._guard.run(_COMPILING, self._insert, module, inputs, graph)

    def _insert(self, module: fx.GraphModule, inputs: Sequence[Any], graph: Any) -> Callable[[], None] | None:
        if python_functions.is_inside():
            return None  # called by one that was read already
        mine = {str(id(m)): m for m in self._names}
        around = self._innermost()
        root = self._root_of(graph.root_tx) or around
        if root is None and not _mentions(module, mine):
            return None
        self._sightings.forwards += 1
        observer = GraphObserver(self._names, self._sightings, self._patterns)
        graphs = read_graph(module, inputs, root, observer, mine)
        undo, left_out = insert(graphs, inputs, self._names, around)
        self._sightings.rejected.update(left_out)
        return partial(_take_back, undo, graphs) if undo else None

    def _root_of(self, frame: Any) -> nn.Module | None:
        """The module whose forward a frame is, also where it goes on after a break."""
        found = [v for v in frame.f_locals.values() if isinstance(v, nn.Module) and v in self._names]
        own = frame.f_locals.get("self")
        return own if own in found else next(iter(found), None)

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
        renamed = _Renamed(plan.layer, layer)
        thaw = Thaw(
            tensors,
            sizes,
            lambda name: self._parameter(renamed(name)),
            lambda name: self._modules[renamed(name)],
            plan.parameters,
        )
        try:
            found = read(plan, thaw, self._settled, self._modules[layer], layer)
        except UnreadError as error:
            self._sightings.rejected[layer] = str(error)
            return
        if found is not None:
            seen, projections = found
            tell(self._receiver, self._guard, layer, self._count(layer, plan.call), seen, projections)

    def _layer(self, plan: Plan, tensors: Sequence[Tensor | None]) -> str | None:
        """The owner's name; None where the call belongs to another model."""
        if plan.anchor is not None:
            parameter = tensors[plan.anchor.slot.index]
            names = [] if parameter is None else self._parameter_names(parameter)
            return _owner(plan, plan.anchor, names)
        around = self._innermost()
        if plan.around is None or around is None:
            return plan.layer if plan.layer in self._modules else None
        within = self._names[around] + plan.layer.removeprefix(plan.around)
        return within if within in self._modules else self._names[around]

    def _parameter_names(self, tensor: Tensor) -> list[str]:
        """The names of the parameter that lies where a tensor does; sharded training moves them about."""
        place = tensor.data_ptr()
        for name in self._by_memory.get(place, []):
            if (parameter := self._parameter(name)) is None or _place(parameter) != place:
                self._by_memory = {}
                break
        if place not in self._by_memory:
            self._by_memory = {}
            for module, name in self._names.items():
                for own, parameter in module._parameters.items():
                    if parameter is not None:
                        self._by_memory.setdefault(_place(parameter), []).append(join(name, own, module))
        return self._by_memory.get(place, [])

    def _parameter(self, name: str) -> nn.Parameter | None:
        module, _, own = name.rpartition(".")
        owner = self._modules.get(module) if module else next(iter(self._names))
        return None if owner is None else owner._parameters.get(own)


def _take_back(undo: Sequence[Callable[[], None]], graphs: Sequence[Traced]) -> None:
    for change in reversed(undo):
        change()
    recompile(graphs)


class _Renamed:
    """From names within one layer to those within another."""

    def __init__(self, old: str, new: str) -> None:
        self._old, self._new = old, new

    def __call__(self, name: str) -> str:
        if name == self._old:
            return self._new
        return self._new + name[len(self._old) :] if name.startswith(self._old + ".") else name


def _owner(plan: Plan, anchor: Anchor, names: Sequence[str]) -> str | None:
    if anchor.name in names:
        return plan.layer
    if not anchor.name.startswith(plan.layer + "."):
        return plan.layer if names else None
    suffix = anchor.name[len(plan.layer) :]
    return next((name[: -len(suffix)] for name in names if name.endswith(suffix)), None)


def _place(parameter: Tensor) -> int:
    local = getattr(parameter, "_local_tensor", parameter)
    return int(local.data_ptr())


def _mentions(module: fx.GraphModule, modules: Mapping[str, nn.Module]) -> bool:
    """Whether any node ran in one of these modules."""
    return any(
        key.partition("@")[0] in modules
        for node in module.graph.nodes
        for key in (node.meta.get("nn_module_stack") or {})
    )
