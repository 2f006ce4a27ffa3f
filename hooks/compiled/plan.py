"""What is known of an attention call in compiled code, with slots in place of its tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, fx, nn

from entropy_monitor.hooks import sharding
from entropy_monitor.hooks.calls import Role
from entropy_monitor.hooks.lineage import Joined, Origin
from entropy_monitor.hooks.linears import LinearMap
from entropy_monitor.hooks.logits import Logits
from entropy_monitor.hooks.products import Contraction
from entropy_monitor.hooks.projections import Projection

_FORMAT = 2  # of compiled code that reads, which torch keeps on disk: raise it when that changes


@dataclass(frozen=True)
class Slot:
    """The place of a tensor among the operator's arguments."""

    index: int


@dataclass(frozen=True)
class Size:
    """The place of a number that may change from call to call."""

    index: int


@dataclass(frozen=True)
class Code:
    """A graph that the call is given, such as a function of FlexAttention's; told apart by its code."""

    code: str
    module: fx.GraphModule = field(compare=False, repr=False)


@dataclass(frozen=True)
class Strided:
    """A part of a tensor's memory, as a weight is that lies within a larger one."""

    whole: Slot
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Unfolded:
    """A weight of three dimensions as `[out, in]`: permuted, the first two made one."""

    whole: Slot | Strided
    order: tuple[int, ...]


@dataclass(frozen=True)
class Map:
    """A `LinearMap`: its tensors, and the names of its parameters and its module.

    Attributes:
        weight: of the map.
        bias: of the map.
        input: of the map.
        output: where there is no input, what tells the shape of its output.
        parameters: names.
        module: name.
        latent: origin of its input, frozen, where that is the bottleneck of a low-rank chain.
        added: factors and maps whose outputs were added to its own.
        rounded: dtype of its output.
    """

    weight: Slot | Strided | Unfolded
    bias: Slot | Strided | None
    input: Slot | None
    output: Slot | None
    parameters: tuple[str, ...]
    module: str
    latent: Frozen | None = None
    added: tuple[tuple[float, Map], ...] = ()
    rounded: torch.dtype | None = None


@dataclass(frozen=True)
class Whole:
    """A `Projection` of W_V or W_O: its weight as `[out, in]`, and how heads lie in it."""

    weight: Slot | Strided
    layout: Any
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Anchor:
    """A parameter of the owner's: where one graph serves several layers or models, it tells which one runs.

    Attributes:
        slot: its place among the tensors.
        below: its name within the owner.
        kind: the owner's class.
    """

    slot: Slot
    below: str
    kind: str


@dataclass(frozen=True)
class Plan:
    """How to read one attention call of a graph.

    Attributes:
        source: name of the source.
        args: of the call, frozen.
        kwargs: of the call, frozen.
        answers: to the source's questions, in order, frozen.
        heads: see `Site`.
        by_hand: see `Site`.
        layer: the owner's name when the graph was compiled.
        call: nth call of this owner in the graph.
        order: of all layers and calls of the graph.
        later: W_V and W_O, where they are known.
        anchor: tells the owner's name when the graph runs.
        around: name of the module that ran eagerly around the graph when it was compiled: without an anchor,
            the one that runs there later tells the owner's name.
        parameters: which tensors are parameters, and of what name.
        autocast: device type and dtype of the autocast around the call, if there is one.
        gradients: whether the graph was compiled for a forward with gradients.
        training: whether the owner was in training mode.
        first_head: see `AttentionCall`.
        ranks: see `AttentionCall`.
        sharded: see `AttentionCall`.
    """

    source: str
    args: Any
    kwargs: Any
    answers: tuple[Any, ...]
    heads: int | None
    by_hand: bool
    layer: str
    call: int
    order: tuple[tuple[str, int], ...]
    later: tuple[tuple[Role, Whole], ...]
    anchor: Anchor | None
    around: str | None
    parameters: tuple[tuple[int, str], ...]
    autocast: tuple[str, torch.dtype] | None
    gradients: bool
    training: bool
    first_head: int = 0
    ranks: tuple[int, ...] = ()
    sharded: bool = False

    @property
    def key(self) -> int:
        """A number that any process gives to the same plan: compiled code is cached on disk."""
        return int.from_bytes(hashlib.sha256(f"{_FORMAT} {self!r}".encode()).digest()[:7], "big")


class OutOfReachError(Exception):
    """A tensor that the operator cannot be given: no node of the graph before the call holds it."""


def freeze(value: Any, tensor: Callable[[Tensor], Any], linear: Callable[[LinearMap], Any]) -> Any:
    """A value with every tensor and linear map in it replaced; an origin out of reach becomes None.

    Args:
        value: dataclasses, tuples, lists and dicts of anything.
        tensor: what to put in place of a tensor.
        linear: what to put in place of a linear map.

    Raises:
        OutOfReachError: a tensor cannot be replaced.
    """
    if isinstance(value, Origin):
        try:
            return _frozen_origin(value, tensor, linear)
        except OutOfReachError:
            return None
    if isinstance(value, Tensor):
        return tensor(value)
    if isinstance(value, LinearMap):
        return linear(value)
    if isinstance(value, (tuple, list)):
        return (list if isinstance(value, list) else tuple)(freeze(item, tensor, linear) for item in value)
    if isinstance(value, dict):
        return {name: freeze(item, tensor, linear) for name, item in value.items()}
    if isinstance(value, (Logits, Contraction)):
        found = {f.name: freeze(getattr(value, f.name), tensor, linear) for f in fields(value) if f.init}
        return Frozen(type(value), tuple(found.items()))
    return value


def _frozen_origin(
    value: Origin, tensor: Callable[[Tensor], Any], linear: Callable[[LinearMap], Any]
) -> Frozen:
    found = [("linear", linear(value.linear)), ("features", value.features), ("factor", value.factor)]
    if isinstance(value, Joined):
        parts = tuple((width, _frozen_origin(part, tensor, linear)) for width, part in value.parts)
        found.append(("parts", parts))
    return Frozen(type(value), tuple(found))


@dataclass(frozen=True)
class Frozen:
    """A dataclass whose fields are frozen."""

    kind: type
    fields: tuple[tuple[str, Any], ...]

    def __repr__(self) -> str:
        return f"{self.kind.__qualname__}{self.fields}"


class Thaw:
    """Puts tensors back in their slots.

    Args:
        tensors: the operator's arguments.
        sizes: the numbers that may change.
        parameter: the parameter of a name, now.
        module: the module of a name.
        parameters: which tensors are parameters, and of what name.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor | None],
        sizes: Sequence[int],
        parameter: Callable[[str], nn.Parameter | None],
        module: Callable[[str], nn.Module],
        parameters: Sequence[tuple[int, str]],
    ) -> None:
        self._tensors = list(tensors)
        for index, name in parameters:  # the operator gets tensors, which no optimizer knows
            real, given = parameter(name), self._tensors[index]
            real = None if real is None else sharding.local(real)
            if real is not None and given is not None and real.data_ptr() == given.data_ptr():
                self._tensors[index] = real
        self._sizes = sizes
        self._parameter = parameter
        self._module = module
        self._maps: dict[Map, LinearMap] = {}

    def __call__(self, value: Any) -> Any:
        """What was frozen, with this call's tensors."""
        if isinstance(value, (Slot, Strided)):
            return self._tensor(value)
        if isinstance(value, Size):
            return self._sizes[value.index]
        if isinstance(value, Code):
            return value.module
        if isinstance(value, Map):
            if value not in self._maps:  # the same map for q and k stays the same
                self._maps[value] = self._map(value)
            return self._maps[value]
        if isinstance(value, Whole):
            weight = self._tensor(value.weight)
            parameters = self._parameters(value.parameters)
            shard = sharding.shard_of(weight)
            return Projection(weight, None, value.layout, None, None, parameters=parameters, shard=shard)
        if isinstance(value, Frozen):
            return value.kind(**{name: self(item) for name, item in value.fields})
        if isinstance(value, (tuple, list)):
            return type(value)(self(item) for item in value)
        if isinstance(value, dict):
            return {name: self(item) for name, item in value.items()}
        return value

    def _tensor(self, place: Slot | Strided | Unfolded) -> Tensor:
        if isinstance(place, Unfolded):
            return self._tensor(place.whole).permute(place.order).flatten(0, -2)
        slot = place.whole if isinstance(place, Strided) else place
        tensor = self._tensors[slot.index]
        if tensor is None:
            raise ValueError(f"the operator got no tensor {slot.index}")
        if isinstance(place, Slot):
            return tensor
        return tensor.as_strided(place.size, place.stride, tensor.storage_offset() + place.offset)

    def _map(self, value: Map) -> LinearMap:
        weight = self._tensor(value.weight)
        bias = None if value.bias is None else self._tensor(value.bias)
        x = None if value.input is None else self._tensor(value.input)
        if x is not None:
            shape = x.shape[:-1] + weight.shape[:1]
        else:
            shape = self._tensor(value.output).shape if value.output is not None else weight.shape[:0]
        found = LinearMap(
            weight, bias, x, shape, self._parameters(value.parameters), self._module(value.module)
        )
        found.latent = self(value.latent)
        found.added = self(value.added)
        found.rounded = value.rounded
        return found

    def _parameters(self, names: tuple[str, ...]) -> tuple[nn.Parameter, ...]:
        found = [self._parameter(name) for name in names]
        return tuple(p for p in found if p is not None)
