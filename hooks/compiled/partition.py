"""Keeps the operator out of Inductor's sight while it decides what to fuse and what to save for backward.

Another user of queries or logits would change these decisions, and with them the last bits of gradients: a
pattern is no longer recognised, a tensor is kept where it was computed again. So the operator leaves the
joint graph before it is optimised and partitioned, and comes back into the forward graph afterwards: it is
given only what lies in memory anyway, and computes what it wants of that by itself.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from entropy_monitor.hooks.compiled.operator import READ, plan_of

Refuse = Callable[[str, str], None]
"""Told of a layer that cannot be read, and why."""

_MODULE = "torch._inductor.compile_fx"
_NAME = "partition_fn"
_KERNELS = (
    "aten.mm.",
    "aten.addmm.",
    "aten.bmm.",
    "aten.baddbmm.",
    "aten.convolution.",
    "scaled_dot_product",
)
_VIEWS = (
    "aten.view.",
    "aten._unsafe_view.",
    "aten.permute.",
    "aten.transpose.",
    "aten.t.",
    "aten.expand.",
    "aten.select.",
    "aten.slice.",
    "aten.unsqueeze.",
    "aten.squeeze.",
    "aten.alias.",
    "aten.detach.",
)
_original: list[Any] = []


class _GoneError(Exception):
    """An argument that cannot be computed again: of a random function, or of an input that is not there."""


def install(refuse: Refuse) -> None:
    """Partition without the operator from now on, if Inductor was loaded; may be called again."""
    compile_fx = sys.modules.get(_MODULE)
    if compile_fx is None or _original or not hasattr(compile_fx, _NAME):
        return
    original = getattr(compile_fx, _NAME)
    _original.append(original)

    def partition(module: fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        return _partition(original, refuse, module, inputs, **kwargs)

    setattr(compile_fx, _NAME, partition)


def uninstall() -> None:
    """Leave Inductor as it was."""
    compile_fx = sys.modules.get(_MODULE)
    if compile_fx is not None and _original:
        setattr(compile_fx, _NAME, _original.pop())


def load() -> None:
    """Load what `install` changes, where something is compiled and Inductor may be what compiles it."""
    if "torch._inductor" in sys.modules:
        pass


def _partition(original: Any, refuse: Refuse, module: fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
    reads = _reads(module.graph)
    if not reads:
        return original(module, inputs, **kwargs)
    whole = fx.Graph()
    whole.graph_copy(module.graph, {})
    for node in reads:
        module.graph.erase_node(node)
    module.recompile()
    forward, backward = original(module, inputs, **kwargs)
    after: fx.Node | None = None
    for node in _reads(whole):
        try:
            after = _put_back(forward.graph, node, after)
        except _GoneError as error:
            plan = plan_of(node.args[0])
            if plan is not None:
                refuse(plan.layer, f"Inductor leaves out what its attention would be read from: {error}")
    forward.graph.lint()
    forward.recompile()
    return forward, backward


def _reads(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "call_function" and node.target is READ]


def _put_back(graph: fx.Graph, read: fx.Node, after: fx.Node | None) -> fx.Node:
    """Call the operator with what lies in memory anyway; it computes its arguments from that itself.

    To have Inductor write more to memory would have it make other kernels, that round in other ways.
    """
    own = fx.Graph()
    present = {node.name: node for node in graph.nodes}
    copies: dict[fx.Node, Any] = {}
    leaves: dict[fx.Node, fx.Node] = {}

    def copied(node: fx.Node) -> fx.Node:
        if node in copies:
            found: fx.Node = copies[node]
            return found
        here = present.get(node.name)
        if here is not None and (_lies_in_memory(here) or _is_random(node)):
            leaves[node] = here
            copies[node] = own.placeholder(node.name)
        elif node.op != "call_function" or _is_random(node):
            raise _GoneError(node.name)
        else:
            for argument in node.all_input_nodes:
                copied(argument)
            copies[node] = own.node_copy(node, lambda a: copies[a])
        made: fx.Node = copies[node]
        return made

    key, tensors, sizes = read.args[:3]
    wanted = [[copied(n) if isinstance(n, fx.Node) else n for n in part] for part in (tensors, sizes)]  # type: ignore[union-attr]
    own.output(tuple(wanted))
    is_number = {node: not isinstance(node.meta.get("val"), torch.Tensor) for node in leaves}
    given = sorted(leaves, key=is_number.__getitem__)  # tensors first
    _in_order(own, [copies[node] for node in given])
    code = fx.GraphModule({}, own).code
    held = [leaves[node] for node in given if not is_number[node]]
    numbers = [leaves[node] for node in given if is_number[node]]
    order = {node: i for i, node in enumerate(graph.nodes)}
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    behind = [*held, *numbers, inputs[-1], *([] if after is None else [after])]  # calls stay in order
    last = max(behind, key=order.__getitem__)
    with graph.inserting_after(last):
        return graph.call_function(READ, (key, held, numbers, code))


def _in_order(graph: fx.Graph, inputs: list[fx.Node]) -> None:
    """Placeholders before everything else, in an order."""
    for node in reversed(inputs):
        next(iter(graph.nodes)).prepend(node)


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _lies_in_memory(node: fx.Node) -> bool:
    """Whether Inductor writes a node's result to memory whatever else uses it."""
    if isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat)):
        return True
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return False  # several tensors
    part = node.target is operator.getitem and isinstance(node.args[0], fx.Node) and _is_kernel(node.args[0])
    return node.op == "placeholder" or _is_kernel(node) or part or _feeds_kernel(node)


def _feeds_kernel(node: fx.Node) -> bool:
    return any(_is_kernel(user) or (_is_view(user) and _feeds_kernel(user)) for user in node.users)


def _is_kernel(node: fx.Node) -> bool:
    """Whether a node is no elementwise function, reduction or view, but a kernel that is called as it is."""
    name = str(node.target)
    return node.op == "call_function" and any(word in name for word in _KERNELS) and node.target is not READ


def _is_view(node: fx.Node) -> bool:
    return node.op == "call_function" and any(name in str(node.target) for name in _VIEWS)
