"""Inserts the reading operator into a graph, before every attention call that was found in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from entropy_monitor.hooks.compiled.graph import GraphCall, Traced
from entropy_monitor.hooks.compiled.operator import READ, register
from entropy_monitor.hooks.compiled.plan import (
    Anchor,
    Code,
    Frozen,
    Map,
    OutOfReachError,
    Plan,
    Size,
    Slot,
    Strided,
    Unfolded,
    Whole,
    freeze,
)
from entropy_monitor.hooks.compiled.reach import Reach, Undo
from entropy_monitor.hooks.linears import LinearMap
from entropy_monitor.hooks.logits import Logits
from entropy_monitor.hooks.projections import Projection


class _Arguments:
    """The operator's arguments for one call: nodes in place of tensors and of numbers."""

    def __init__(
        self, traced: Traced, call: GraphCall, names: Mapping[int, str], owners: _Names, undo: list[Undo]
    ) -> None:
        self.tensors: list[fx.Node] = []
        self.sizes: list[fx.Node] = []
        self._traced = traced
        self._reach = Reach(traced, call.node, undo)
        self._names = names
        self._owners = owners

    def slot(self, node: fx.Node) -> Slot:
        """A node's place among the tensors."""
        if node not in self.tensors:
            self.tensors.append(node)
        return Slot(self.tensors.index(node))

    def of_node(self, value: Any) -> Any:
        """An argument of the call as the graph has it."""
        if isinstance(value, fx.Node):
            if value.op == "get_attr":
                held = getattr(self._traced.module, str(value.target), None)
                if isinstance(held, fx.GraphModule):
                    return Code(held.code, held)
            known = value.meta.get("example_value")
            if isinstance(known, Tensor):
                return self.slot(value)
            if isinstance(known, (int, torch.SymInt)):
                if value not in self.sizes:
                    self.sizes.append(value)
                return Size(self.sizes.index(value))
            raise OutOfReachError
        if isinstance(value, (tuple, list)):
            return tuple(self.of_node(item) for item in value)
        if isinstance(value, dict):
            return {name: self.of_node(item) for name, item in value.items()}
        return value

    def tensor(self, tensor: Tensor) -> Slot | Strided:
        """The place of a tensor of the fake run, or of the weight that it is a part of."""
        node = self._reach.node_of(tensor)
        if node is not None:
            return self.slot(node)
        found = self._reach.holder_of(tensor)
        if found is None:
            raise OutOfReachError
        offset = int(tensor.storage_offset()) - int(found[1].storage_offset())
        return Strided(self.slot(found[0]), tuple(tensor.shape), tuple(tensor.stride()), offset)

    def linear(self, linear: LinearMap) -> Map:
        """A linear map with slots."""
        x, output = None, None
        try:
            x = None if linear.input is None else self.tensor(linear.input)
        except OutOfReachError:
            x = None
        if not isinstance(x, Slot):
            x = None
            node = self._reach.shaped(linear.shape)
            output = None if node is None else self.slot(node)
        weight: Slot | Strided | Unfolded
        if linear.unfolded is None:
            weight = self.tensor(linear.weight)
        else:
            weight = Unfolded(self.tensor(linear.unfolded[0]), linear.unfolded[1])
        return Map(
            weight,
            None if linear.bias is None else self.tensor(linear.bias),
            x,
            output,
            self.parameters(linear.parameters),
            self._owners.module(linear.module),
            self._latent(linear),
            tuple((factor, self.linear(other)) for factor, other in linear.added),
        )

    def _latent(self, linear: LinearMap) -> Frozen | None:
        if linear.latent is None:
            return None
        latent = freeze(linear.latent, self.tensor, self.linear)
        if latent is None:  # the last map of a chain alone would pass for the whole
            raise OutOfReachError
        found: Frozen = latent
        return found

    def parameters(self, parameters: Sequence[nn.Parameter]) -> tuple[str, ...]:
        """The names of parameters, given as those of the model or as their fakes."""
        found = []
        for parameter in parameters:
            name = self._names.get(id(parameter)) or self._owners.parameter(parameter)
            if name is not None:
                found.append(name)
        return tuple(found)

    def whole(self, projection: Projection) -> Whole:
        """W_V or W_O with slots."""
        return Whole(
            self.tensor(projection.weight), projection.layout, self.parameters(projection.parameters)
        )


class _Names:
    """Names of the watched modules and of their parameters as they are now."""

    def __init__(self, names: Mapping[nn.Module, str]) -> None:
        self._modules = names
        self._parameters = {
            id(p): join(name, own, module)
            for module, name in names.items()
            for own, p in module._parameters.items()
            if p is not None
        }
        self._root = next(iter(names), None)

    def module(self, module: nn.Module) -> str:
        """Of a module; it may be one that is not watched."""
        return self._modules.get(module, "")

    def parameter(self, parameter: object) -> str | None:
        """Of a parameter."""
        return self._parameters.get(id(parameter))


def join(module_name: str, own: str, module: nn.Module) -> str:
    """The name of a parameter: its module's and its own. A model's own name is its class."""
    return own if module_name == type(module).__name__ else f"{module_name}.{own}"


def insert(
    graphs: Sequence[Traced],
    inputs: Sequence[Any],
    names: Mapping[nn.Module, str],
    around: nn.Module | None,
) -> tuple[list[Undo], dict[str, str]]:
    """Insert the operator.

    Args:
        graphs: the captured graph first, then those within it.
        inputs: of the captured graph, real.
        names: qualified name of every watched module.
        around: the module that runs eagerly around the graph.

    Returns:
        What undoes it, to be called from the last to the first, and why calls were left out, by layer.
    """
    owners = _Names(names)
    outer = [n for n in graphs[0].graph.nodes if n.op == "placeholder"] if graphs else []
    real = dict(zip(outer, inputs, strict=False))
    by_fake: dict[int, str] = {}
    for tensor in graphs[0].kept if graphs else ():
        name = owners.parameter(real.get(graphs[0].nodes[id(tensor)]))
        if name is not None:
            by_fake[id(tensor)] = name
    undo: list[Undo] = []
    left_out: dict[str, str] = {}
    for traced in graphs:
        for call in traced.calls:
            try:
                _insert(traced, call, by_fake, owners, None if around is None else names[around], undo)
            except OutOfReachError:
                left_out[call.layer] = "its queries or keys are not among the values of the compiled graph"
    if undo:
        recompile(graphs)
    return undo, left_out


def recompile(graphs: Sequence[Traced]) -> None:
    """Have changed graphs run as they are now, those within others first."""
    for traced in reversed(graphs):
        traced.graph.lint()
        traced.module.recompile()


def _insert(
    traced: Traced,
    call: GraphCall,
    by_fake: Mapping[int, str],
    owners: _Names,
    around: str | None,
    undo: list[Undo],
) -> None:
    arguments = _Arguments(traced, call, by_fake, owners, undo)
    if call.args is None:
        args, kwargs = arguments.of_node(tuple(call.node.args)), arguments.of_node(dict(call.node.kwargs))
    else:
        args, kwargs = freeze(tuple(call.args), arguments.tensor, arguments.linear), {}
    answers = tuple(_answer(arguments, question, answer) for question, answer in call.answers)
    later = []
    for role, projection in call.later.items():
        try:
            later.append((role, arguments.whole(projection)))
        except OutOfReachError:
            continue  # made after the attention, or from weights
    anchor = _anchor(arguments, call, traced, by_fake, owners)
    names = {traced.nodes[id(t)]: by_fake[id(t)] for t in traced.kept if id(t) in by_fake}
    plan = Plan(
        call.source,
        args,
        kwargs,
        answers,
        call.heads,
        call.by_hand,
        call.layer,
        call.call,
        tuple(later),
        anchor,
        around,
        tuple((i, names[node]) for i, node in enumerate(arguments.tensors) if node in names),
        torch.is_grad_enabled(),
        call.owner.training,
    )
    graph = traced.graph
    with graph.inserting_before(call.node):
        detached = [graph.call_method("detach", (node,)) for node in arguments.tensors]
        read = graph.call_function(READ, (register(plan), detached, list(arguments.sizes)))
    for node, original in zip(detached, arguments.tensors, strict=True):
        node.meta["example_value"] = original.meta.get("example_value")
    for node in (*detached, read):
        node.meta.update({k: v for k, v in call.node.meta.items() if k in ("nn_module_stack", "stack_trace")})
        undo.append(partial(graph.erase_node, node))


def _answer(arguments: _Arguments, question: str, answer: Any) -> tuple[str, Any]:
    """An answer with slots; a factor of the logits that is out of reach is not known."""
    try:
        return question, freeze(answer, arguments.tensor, arguments.linear)
    except OutOfReachError:
        if not isinstance(answer, Logits):
            raise
    plain = replace(answer, scale=None, inner=None)
    return question, freeze(plain, arguments.tensor, arguments.linear)


def _anchor(
    arguments: _Arguments, call: GraphCall, traced: Traced, by_fake: Mapping[int, str], owners: _Names
) -> Anchor | None:
    """A parameter below the owner, or used by what runs in it."""
    prefix = owners.module(call.owner) + "."
    if "." not in prefix[:-1] and prefix[:-1] == type(call.owner).__name__:
        prefix = ""
    best: tuple[bool, fx.Node, str] | None = None
    for tensor in traced.kept:
        node = traced.nodes[id(tensor)]
        name = by_fake.get(id(tensor))
        if name is None or not name.startswith(prefix) or node.op != "placeholder":
            continue
        used = node in arguments.tensors
        if best is None or used > best[0]:
            best = (used, node, name)
    return None if best is None else Anchor(arguments.slot(best[1]), best[2])
