"""The weights of single heads within a model's parameters, to be scaled in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from entropy_monitor.hooks.projections import Layout, Place, Projection
from entropy_monitor.hooks.samples import TOLERANCE, TOLERANCE_LOW, sampled
from entropy_monitor.hooks.storage import storage_of
from entropy_monitor.remedies.qk_clip.scaling import scale_heads_

PARAMETRIZED = (
    "its weight is parametrized, so scaling it does little or nothing; sigma_reparam and the like bound it "
    "already: leave QK-clip away, or em.fold(model) first"
)
_ENOUGH = 4  # vectors of a head, to tell a norm from a linear map


class NotScalableError(Exception):
    """Scaling weights would not scale what enters attention; says why, and what to do instead."""


@dataclass(frozen=True)
class HeadWeights:
    """Where the weights and biases of the heads of a projection lie.

    Attributes:
        weight: the parameter that holds them.
        place: in its memory, `[groups, heads of a group, d_model, d_head]`.
        features: output features of the linear map that they are.
        bias: the parameter that holds the biases, or None.
        bias_place: in its memory, `[groups, heads of a group, d_head]`.
    """

    weight: nn.Parameter
    place: Place
    features: frozenset[int]
    bias: nn.Parameter | None = None
    bias_place: Place | None = None

    @property
    def heads(self) -> int:
        """How many heads these are."""
        return self.place.size[0] * self.place.size[1]

    @property
    def identity(self) -> tuple[int, Place]:
        """The same for the same weights."""
        return id(self.weight), self.place

    def overlaps(self, other: HeadWeights) -> bool:
        """Whether a number belongs to both."""
        return self.weight is other.weight and not self.features.isdisjoint(other.features)

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The parameters that hold them."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def is_frozen(self) -> bool:
        """Whether any of them is not trained."""
        return not all(parameter.requires_grad for parameter in self.parameters)

    def scale_(self, factors: Tensor) -> None:
        """Multiply the weights and biases of each head by its factor, `[H]`, float64."""
        by_group = factors.view(self.place.size[:2])
        scale_heads_(self.place.read(self.weight), by_group)
        if self.bias is not None and self.bias_place is not None:
            scale_heads_(self.bias_place.read(self.bias), by_group)


def head_weights(projection: Projection, names: Mapping[nn.Parameter, str]) -> HeadWeights:
    """Where a projection's heads lie in the model's parameters.

    Args:
        projection: as a forward used it.
        names: of the model's parameters.

    Raises:
        NotScalableError: if they are no part of one parameter.
    """
    if projection.shard is not None:
        raise NotScalableError(
            "its weights are split over processes (FSDP, tensor parallelism); QK-clip needs whole ones, as "
            "with DistributedDataParallel"
        )
    parameter = _behind(projection.weight, names)
    if parameter is None:
        raise NotScalableError(_computed(projection, names))
    layout = projection.layout
    features = _features(layout)
    if len(features) != layout.heads * layout.head_size:
        raise NotScalableError("several heads share their weights, and could only be scaled together")
    bias, bias_place = None, None
    if projection.bias is not None:
        bias = _behind(projection.bias, names)
        if bias is None:
            raise NotScalableError("its bias is no parameter: something computes it before each forward")
        step = projection.bias.stride(0)
        bias_place = Place(
            (layout.groups, layout.heads // layout.groups, layout.head_size),
            (layout.group_stride * step, layout.head_stride * step, layout.stride * step),
            int(projection.bias.storage_offset()) + layout.base * step,
        )
    return HeadWeights(parameter, projection.place, features, bias, bias_place)


def is_parametrized(name: str) -> bool:
    """Whether a parameter of this name is what a parametrization makes a weight of."""
    return "parametrizations" in name.split(".")


def is_linear(tensor: Tensor, projection: Projection) -> bool | None:
    """Whether what enters attention grows with the weights: rotary embeddings, a factor, and no more.

    Told from the norms of some vectors; waits for the device.

    Args:
        tensor: the queries or keys that enter the product, `[B, H, T, D]`; key heads perhaps repeated.
        projection: where they come from.

    Returns:
        None where there are too few vectors to tell.

    Raises:
        NotScalableError: if the projection's input is not known.
    """
    if isinstance(projection.factor, float) and projection.factor == 1.0:
        return True
    heads = projection.layout.heads
    tensor = tensor[:, :: tensor.shape[1] // heads] if tensor.shape[1] % heads == 0 else tensor
    seen, made = sampled(tensor, projection)
    if made is None:
        if tensor.numel() < _ENOUGH * tensor.shape[1] * tensor.shape[-1]:
            return None
        raise NotScalableError(
            "what its projections were applied to is not known, nor so what came after them"
        )
    seen_norm, made_norm = (
        torch.linalg.vector_norm(x, dim=-1).movedim(1, 0).flatten(1) for x in (seen, made)
    )
    known = (made_norm > 0).all(0)
    if int(known.sum()) < _ENOUGH:
        return None
    ratio = seen_norm[:, known] / made_norm[:, known]
    low, high = ratio.amin(-1), ratio.amax(-1)
    tolerance = TOLERANCE_LOW if _rounds(tensor, projection) else TOLERANCE
    return bool(((high - low) <= 2 * tolerance * high).all())


def _rounds(tensor: Tensor, projection: Projection) -> bool:
    low = {torch.bfloat16, torch.float16}
    # Under autocast the products are rounded whatever the weights are.
    dtypes = {tensor.dtype, projection.weight.dtype, projection.rounded} | (
        {projection.input.dtype} if projection.input is not None else set()
    )
    return bool(low & dtypes) or torch.is_autocast_enabled(tensor.device.type)


def _behind(tensor: Tensor, names: Mapping[nn.Parameter, str]) -> nn.Parameter | None:
    """The parameter in whose memory a tensor lies."""
    memory = storage_of(tensor)
    if memory is None:
        return None
    offset = tensor.storage_offset()
    for parameter in names:
        if storage_of(parameter) == memory:
            first = parameter.storage_offset()
            if first <= offset < first + parameter.numel() and parameter.dtype == tensor.dtype:
                return parameter
    return None


def _computed(projection: Projection, names: Mapping[nn.Parameter, str]) -> str:
    behind = [names[p] for p in projection.parameters if p in names]
    if any(is_parametrized(name) for name in behind):
        return PARAMETRIZED
    if len(behind) > 1:
        return (
            f"it is made by several weights ({', '.join(behind[:4])}), as in low-rank attention or "
            "adapters, and which part to scale is not known"
        )
    return "its weight is no parameter of the model: something computes it before each forward"


def _features(layout: Layout) -> frozenset[int]:
    return frozenset(
        layout.base + g * layout.group_stride + h * layout.head_stride + i * layout.stride
        for g in range(layout.groups)
        for h in range(layout.heads // layout.groups)
        for i in range(layout.head_size)
    )
