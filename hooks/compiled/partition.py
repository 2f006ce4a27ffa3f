"""Keeps the operator out of Inductor's sight while it decides what to fuse and what to save for backward.

Another user of queries or logits would change these decisions, and with them the last bits of gradients: a
pattern is no longer recognised, a tensor is kept where it was computed again. So the operator leaves the
joint graph before it is optimised and partitioned, and comes back into the forward graph afterwards, with
what of its arguments has gone meanwhile computed for it alone.
"""

from __future__ import annotations

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
_original: list[Any] = []


class _GoneError(Exception):
    """An argument that cannot be computed again: of a random function, or of an input that is not there."""


def install(refuse: Refuse) -> None:
    """Partition without the operator from now on, if Inductor is in use; may be called again."""
    compile_fx = _compile_fx()
    if compile_fx is None or _original or not hasattr(compile_fx, _NAME):
        return
    original = getattr(compile_fx, _NAME)
    _original.append(original)

    def partition(module: fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        return _partition(original, refuse, module, inputs, **kwargs)

    setattr(compile_fx, _NAME, partition)


def uninstall() -> None:
    """Leave Inductor as it was."""
    compile_fx = _compile_fx()
    if compile_fx is not None and _original:
        setattr(compile_fx, _NAME, _original.pop())


def _compile_fx() -> Any:
    if "torch._inductor" not in sys.modules:
        return None
    from torch._inductor import compile_fx

    return compile_fx


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
    for node in _reads(whole):
        try:
            _put_back(forward.graph, node)
        except _GoneError as error:
            plan = plan_of(node.args[0])
            if plan is not None:
                refuse(plan.layer, f"Inductor leaves out what its attention would be read from: {error}")
    forward.graph.lint()
    forward.recompile()
    return forward, backward


def _reads(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "call_function" and node.target is READ]


def _put_back(graph: fx.Graph, read: fx.Node) -> None:
    """Copy the operator, and what it needs and is no longer there, behind the last of what is."""
    order = {node.name: i for i, node in enumerate(graph.nodes)}
    present = {node.name: node for node in graph.nodes}
    missing: list[fx.Node] = []
    _collect(read, present, missing)
    needed = [present[a.name] for node in missing for a in node.all_input_nodes if a.name in present]
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    last = max([*needed, inputs[-1]], key=lambda node: order[node.name])
    made: dict[fx.Node, fx.Node] = {}
    for node in missing:
        with graph.inserting_after(last):
            last = graph.node_copy(node, lambda a: made[a] if a in made else present[a.name])
        made[node] = last


def _collect(node: fx.Node, present: dict[str, fx.Node], missing: list[fx.Node]) -> None:
    """A node and those before it that are not there, in order."""
    if node in missing or (node.name in present and node.target is not READ):
        return
    if node.op != "call_function":
        raise _GoneError(str(node.name))
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        raise _GoneError(f"{node.target} is random")
    for argument in node.all_input_nodes:
        _collect(argument, present, missing)
    missing.append(node)
