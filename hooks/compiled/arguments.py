"""The operator's arguments: nodes in place of tensors, names in place of parameters and modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from entropy_monitor.hooks.compiled.graph import GraphCall, Traced
from entropy_monitor.hooks.compiled.plan import (
    Code,
    Frozen,
    Map,
    OutOfReachError,
    Size,
    Slot,
    Strided,
    Unfolded,
    Whole,
    freeze,
)
from entropy_monitor.hooks.compiled.reach import Reach, Undo
from entropy_monitor.hooks.linears import LinearMap
from entropy_monitor.hooks.projections import Projection


class Arguments:
    """The operator's arguments for one call: nodes in place of tensors and of numbers."""

    def __init__(
        self, traced: Traced, call: GraphCall, names: Mapping[int, str], owners: Names, undo: list[Undo]
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
            if isinstance(known, (float, torch.SymFloat)):
                return float(known) if isinstance(known, float) else float(known.node.hint)
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
            linear.rounded,
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


class Names:
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


def path_of(name: str, module: nn.Module) -> str:
    """A module's name as its parameters have it; a model's own name is its class."""
    return "" if name == type(module).__name__ else name


def join(name: str, own: str, module: nn.Module) -> str:
    """The name of a parameter: its module's and its own."""
    path = path_of(name, module)
    return f"{path}.{own}" if path else own
