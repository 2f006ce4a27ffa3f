"""Where W_Q and W_K of each head lie in the weights that ran."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from entropy_monitor.hooks.sharding import Shard
from entropy_monitor.hooks.storage import storage_of


@dataclass(frozen=True)
class Layout:
    """Which output features of a linear map make up which head.

    Heads come in groups of equal size, most often one of all heads. Feature j of head h of group g is
    `base + g * group_stride + h * head_stride + j * stride`.
    """

    heads: int
    head_size: int
    base: int
    head_stride: int
    stride: int = 1
    groups: int = 1
    group_stride: int = 0

    @property
    def last(self) -> int:
        """The largest feature index that is used."""
        inner = self.heads // self.groups
        groups = self.base + (self.groups - 1) * self.group_stride
        return groups + (inner - 1) * self.head_stride + (self.head_size - 1) * self.stride


@dataclass(frozen=True)
class Rows:
    """Which row of a flattened input belongs to token t of sequence b: `base + b * batch + t * token`."""

    sequences: int
    tokens: int
    base: int
    batch: int
    token: int


@dataclass(frozen=True)
class Place:
    """A strided part of a tensor's memory."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def read(self, tensor: Tensor) -> Tensor:
        """That part, as a view without gradients."""
        return tensor.detach().as_strided(self.size, self.stride, self.offset)


@dataclass(frozen=True)
class WeightPart:
    """The part of a parameter that holds one projection of one layer."""

    parameter: nn.Parameter
    place: Place


@dataclass(frozen=True)
class Projection:
    """The linear map that a q, k or v comes from.

    Attributes:
        weight: `[out, in]`, as used in this forward (gathered, reparametrized).
        bias: `[out]`, or None.
        layout: which of its output features make up which head.
        input: what it was applied to, `[..., in]`; None if it is gone.
        rows: which rows of the input are which tokens; None if unknown.
        factor: c where what enters attention is c times the output and nothing else; NaN where rotary
            embeddings, norms or the like came between.
        parameters: the parameters behind `weight`.
        certain: NaN where repeated key heads turn out not to be equal; None where there is no doubt.
        shard: which part of the whole weight this is; None for a plain tensor.
        rounded: dtype of its output, where that is known; what enters attention may have been cast up since.
    """

    weight: Tensor
    bias: Tensor | None
    layout: Layout
    input: Tensor | None
    rows: Rows | None
    factor: Tensor | float = 1.0
    parameters: tuple[nn.Parameter, ...] = ()
    certain: Tensor | None = None
    shard: Shard | None = None
    rounded: torch.dtype | None = None

    @property
    def is_whole(self) -> bool:
        """Whether this process holds all heads."""
        return self.shard is None or not self.shard.dims

    @property
    def is_all(self) -> bool:
        """Whether its heads take all features of the weight."""
        return self.layout.heads * self.layout.head_size == self.weight.shape[0]

    def head_weights(self) -> Tensor:
        """W of each head as `[H, d_model, d_head]`, float32; NaN where it is not certain."""
        weights = self.place.read(self.weight).float().flatten(0, 1)
        return weights if self.certain is None else weights * self.certain

    @property
    def place(self) -> Place:
        """Where the heads lie in the memory of `weight`: `[groups, heads of a group, d_model, d_head]`."""
        at = self.layout
        out, features = self.weight.stride()
        return Place(
            (at.groups, at.heads // at.groups, self.weight.shape[1], at.head_size),
            (at.group_stride * out, at.head_stride * out, features, at.stride * out),
            int(self.weight.storage_offset()) + at.base * out,
        )

    def head_biases(self) -> Tensor | None:
        """The bias of each head as `[H, d_head]`, float32; None without a bias."""
        if self.bias is None:
            return None
        b, at = self.bias.detach(), self.layout
        step = b.stride(0)
        heads = b.as_strided(
            (at.groups, at.heads // at.groups, at.head_size),
            (at.group_stride * step, at.head_stride * step, at.stride * step),
            b.storage_offset() + at.base * step,
        )
        return heads.flatten(0, 1).float()

    def matrix(self) -> Tensor:
        """The weight of all heads as `[H · d_head, d_model]`, in its own dtype; NaN where not certain."""
        weights = self.place.read(self.weight).flatten(0, 1).transpose(1, 2).flatten(0, 1)
        return weights if self.certain is None else weights * self.certain

    def part_of_parameter(self) -> WeightPart | None:
        """The same weights in the parameter behind them; None for a weight made from several parameters."""
        if len(self.parameters) != 1:
            return None
        (parameter,) = self.parameters
        memory = storage_of(self.weight)
        is_view = self.weight is parameter or (memory is not None and memory == storage_of(parameter))
        same_form = parameter.shape == self.weight.shape and parameter.stride() == self.weight.stride()
        return WeightPart(parameter, self.place) if is_view or same_form else None

    def describe(self) -> str:
        """How the heads lie in the weight, in words."""
        shape = "×".join(str(n) for n in self.weight.shape)
        part = (
            ""
            if self.layout.last + 1 - self.layout.base == self.weight.shape[0]
            else (f", features {self.layout.base}…{self.layout.last}")
        )
        return f"weight {shape}{part}"

    def inputs(self) -> Tensor | None:
        """The input of every token as `[B, T, d_model]`; None where it is unknown."""
        if self.input is None or self.rows is None:
            return None
        x = self.input.detach().reshape(-1, self.input.shape[-1])
        r, s = self.rows, x.stride(0)
        if r.base + (r.sequences - 1) * r.batch + (r.tokens - 1) * r.token >= x.shape[0]:
            return None
        return x.as_strided(
            (r.sequences, r.tokens, x.shape[1]),
            (r.batch * s, r.token * s, x.stride(1)),
            x.storage_offset() + r.base * s,
        )


def parameters_of(weight: Tensor) -> tuple[nn.Parameter, ...]:
    """The parameter that a weight is, or is a view of; none for one that is computed."""
    base = weight if weight._base is None else weight._base
    return (base,) if isinstance(base, nn.Parameter) else ()
