"""Which node of a graph holds a tensor before a call, so that the operator can be given it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from entropy_monitor.hooks.compiled.graph import Traced
from entropy_monitor.hooks.storage import storage_of

Undo = Callable[[], None]


class Reach:
    """The nodes that come before a call.

    A graph within another (a checkpointed region) is given what only the one around it holds, such as the
    weights of projections that were applied outside.

    Args:
        traced: the graph.
        call: one of its nodes.
        undo: takes what undoes a change to a graph.
    """

    def __init__(self, traced: Traced, call: fx.Node, undo: list[Undo]) -> None:
        self._traced = traced
        self._undo = undo
        order = {node: i for i, node in enumerate(traced.graph.nodes)}
        self._before = {node for node, i in order.items() if i < order[call]}
        self._storages: dict[int, tuple[fx.Node, Tensor]] = {}
        for tensor in traced.kept:
            node = traced.nodes[id(tensor)]
            if node in self._before and (memory := storage_of(tensor)) is not None:
                self._storages.setdefault(memory, (node, tensor))

    def node_of(self, tensor: Tensor) -> fx.Node | None:
        """The node that made just this tensor; None if there is none."""
        node = self._traced.nodes.get(id(tensor))
        if node is not None and node in self._before:
            return node
        around = self._around()
        outer = None if around is None else around.node_of(tensor)
        return None if outer is None else self._lift(outer, tensor)

    def holder_of(self, tensor: Tensor) -> tuple[fx.Node, Tensor] | None:
        """A node whose tensor lies in the same memory, of sizes that never change, and that tensor."""
        memory = storage_of(tensor)
        found = None if memory is None else self._storages.get(memory)
        if found is not None and _is_static(found[0]):
            return found
        around = self._around()
        outer = None if around is None else around.holder_of(tensor)
        return None if outer is None else (self._lift(*outer), outer[1])

    def shaped(self, shape: torch.Size) -> fx.Node | None:
        """A node whose tensor has a shape."""
        for tensor in self._traced.kept:
            node = self._traced.nodes[id(tensor)]
            if node in self._before and node.op != "placeholder" and tensor.shape == shape:
                return node
        return None

    def _around(self) -> Reach | None:
        if self._traced.parent is None or self._traced.call is None:
            return None
        return Reach(self._traced.parent, self._traced.call, self._undo)

    def _lift(self, outer: fx.Node, tensor: Tensor) -> fx.Node:
        """Give a node of the graph around to this one as a further argument."""
        graph, call = self._traced.graph, self._traced.call
        assert call is not None  # noqa: S101  there is a graph around
        last = [node for node in graph.nodes if node.op == "placeholder"][-1]
        with graph.inserting_after(last):
            inner = graph.placeholder(f"{outer.name}_for_reading")
        inner.meta["example_value"] = outer.meta.get("example_value")
        before = call.args
        call.args = (*before, outer)

        def undo() -> None:
            call.args = before
            graph.erase_node(inner)

        self._undo.append(undo)
        self._traced.nodes[id(tensor)] = inner
        self._traced.kept.append(tensor)
        self._before.add(inner)
        return inner


def _is_static(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, Tensor) and not any(isinstance(n, torch.SymInt) for n in value.shape)
