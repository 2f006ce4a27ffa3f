"""The linear maps that ran in a forward: what they were, and enough to recognise their outputs later.

A linear map may be called as `F.linear`, `addmm`, `x @ W`, `einsum` with a weight of up to three
dimensions, or a convolution of width one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from entropy_monitor.hooks.features import Features
from entropy_monitor.hooks.products import Contraction, contraction_of, is_weight
from entropy_monitor.hooks.projections import Layout, Projection, parameters_of
from entropy_monitor.hooks.sharding import shard_of, splits_inputs
from entropy_monitor.hooks.storage import storage_of, version_of

if TYPE_CHECKING:
    from entropy_monitor.hooks.lineage import Origin
    from entropy_monitor.hooks.scope import Scope

_ADDMM = (torch.addmm, Tensor.addmm)
_MATMUL = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
_CONV = (torch.conv1d, torch.conv2d)
FUNCTIONS: frozenset[Callable[..., Any]] = frozenset({F.linear, *_ADDMM, *_MATMUL, *_CONV, torch.einsum})


class LinearMap:
    """A linear map that was applied to something.

    Args:
        weight: `[out, in]`, as it was used (gathered, reparametrized).
        bias: `[out]`, or None.
        input: what it was applied to, `[..., in]`; None if that is not kept.
        shape: of its output; `[..., out]` but for convolutions.
        parameters: the parameters behind `weight`.
        module: in whose forward it ran, torch's own layers apart.

    Attributes:
        latent: where its input comes from, if that is the bottleneck of a low-rank chain: W_b of W_b W_a.
        unfolded: what `weight` is a permuted and flattened copy of, and in which order of dimensions.
        added: factors and other maps of its input (low-rank adapters) whose outputs were added to its own.
        shard: which part of the whole weight this is; None where the process holds all of it.
        rounded: dtype of its output, where that is known.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        input: Tensor | None,  # noqa: A002  torch's name for it
        shape: torch.Size,
        parameters: tuple[nn.Parameter, ...],
        module: nn.Module,
    ) -> None:
        self.weight = weight
        self.bias = bias
        self.shape = shape
        self.parameters = parameters
        self.module = module
        self.unfolded: tuple[Tensor, tuple[int, ...]] | None = None
        self.latent: Origin | None = None
        self.added: tuple[tuple[float, LinearMap], ...] = ()
        self.shard = shard_of(weight)
        self.rounded: torch.dtype | None = None
        self._input = input

    @property
    def features(self) -> int:
        """How many output features it has."""
        return self.weight.shape[0]

    @property
    def all_features(self) -> int:
        """How many output features it has on all processes together."""
        if self.shard is None or splits_inputs(self.weight, self.shard):
            return self.features
        return math.prod(self.shard.shape) // self.weight.shape[1]

    @property
    def is_split(self) -> bool:
        """Whether this process holds only a part of its weight, or of that of a map it is made with."""
        shards = [shard_of(weight) for weight in self.weights()]
        return any(shard is not None and shard.dims for shard in shards)

    def weights(self) -> tuple[Tensor, ...]:
        """Its weight, those of maps that were added to it, and of those that made its input in a chain."""
        others = [other for _, other in self.added]
        if self.latent is not None:
            others.append(self.latent.linear)
        return (self.weight, *(w for other in others for w in other.weights()))

    @property
    def input(self) -> Tensor | None:
        """What it was applied to, `[..., in]`; None if that is gone, and for convolutions."""
        return self._input

    def from_width(self, width: int) -> LinearMap | None:
        """The map of a low-rank chain, this being the last one, that takes inputs of a width."""
        first: LinearMap = self
        while first.weight.shape[1] != width:
            if first.latent is None:
                return None
            first = first.latent.linear
        return first

    def whole(self) -> Projection:
        """The map as one head that takes all output features."""
        out = self.features
        return Projection(
            self.weight,
            self.bias,
            Layout(1, out, 0, out),
            None,
            None,
            parameters=self.parameters,
            shard=self.shard,
        )


class LinearCall(LinearMap):
    """A linear map that ran in a forward, and how to recognise views of its output.

    Attributes:
        scope: the module forward in which it ran.
        home: the one around it that uses it, where that module is no more than a projection.
        feature_stride: distance in memory between neighbouring output features; 0 where the output's memory
            does not say which element is which feature.
        mixed: whether its output was overwritten in place with a sum of it and something else.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        input: Tensor | None,  # noqa: A002  torch's name for it
        output: Tensor,
        scope: Scope,
        module: nn.Module,
        feature_stride: int | None = None,
    ) -> None:
        parameters = parameters_of(weight) or _matrices(module)
        super().__init__(weight, bias, input, output.shape, parameters, scope.module)
        self._input_version = 0 if input is None else version_of(input)
        self.scope = self.home = scope
        self.rounded = output.dtype
        self.offset = int(output.storage_offset())
        self.version = version_of(output)
        self.mixed = False
        if feature_stride is None:
            feature_stride = 1 if output.is_contiguous() else 0
        self.feature_stride = feature_stride
        # A weak reference keeps the storage's identity from being reused, not its memory.
        storage = output.untyped_storage()
        self._storage = StorageWeakRef(storage)  # type: ignore[no-untyped-call]

    @property
    def input(self) -> Tensor | None:
        """See `LinearMap`; None too once it was written over."""
        x = self._input
        return None if x is None or version_of(x) != self._input_version else x

    def release(self) -> None:
        """Stop keeping the input alive."""
        self._input = None


def linear_call(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Tensor,
    scope: Scope,
    module: nn.Module,
) -> tuple[LinearCall, Features | None] | None:
    """The linear map that a torch function was; None if it was none.

    Args:
        func: the function that ran.
        args: its arguments.
        kwargs: its keyword arguments.
        output: what it returned.
        scope: where it ran.
        module: whose forward called it, for the parameters behind a weight that is computed (reparametrized).

    Returns:
        The call, and which features its output holds where the output's memory alone does not tell.
    """
    if func not in FUNCTIONS or storage_of(output) is None:
        return None
    if func is torch.einsum or func in _MATMUL:
        contraction = contraction_of(func, args)
        return None if contraction is None else _from_contraction(contraction, output, scope, module)
    if func in _CONV:
        return _from_convolution(args, kwargs, output, scope, module)
    if func is F.linear:
        x, weight, bias = _linear_arguments(*args, **kwargs)
    elif (
        len(args) == 3 and not kwargs and args[0].dim() == 1
    ):  # addmm; a matrix in place of the bias is a sum
        bias, x, weight = args[0], args[1], args[2].transpose(-1, -2)
    else:
        return None
    if weight.dim() != 2 or output.shape[-1:] != weight.shape[:1]:  # the latter where a DTensor was gathered
        return None
    return LinearCall(weight, bias, x, output, scope, module), None


def _from_contraction(
    contraction: Contraction, output: Tensor, scope: Scope, module: nn.Module
) -> tuple[LinearCall, Features | None] | None:
    """`x @ W` and the like, with W of two or three dimensions: the third one is the heads."""
    c = contraction
    if not is_weight(c.right) or c.left_rows is None:
        return None
    own = [name for name in c.right_names if name != c.contracted]
    if not 1 <= len(own) <= 2 or not set(own) <= set(c.out):
        return None
    order = [c.right_names.index(name) for name in (*own, c.contracted)]
    permuted = c.right.permute(order)
    weight = permuted.flatten(0, -2) if len(own) == 2 else permuted
    sizes = permuted.shape[:-1]
    in_order = c.out.endswith("".join(own)) and output.is_contiguous()
    call = LinearCall(weight, None, c.left_rows, output, scope, module, 1 if in_order else 0)
    call.unfolded = (c.right, tuple(order)) if len(own) == 2 else None
    if in_order:
        return call, None
    dims = tuple(reversed([(n, math.prod(sizes[i + 1 :])) for i, n in enumerate(sizes)]))
    return call, Features(0, dims)


def _from_convolution(
    args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor, scope: Scope, module: nn.Module
) -> tuple[LinearCall, Features | None] | None:
    """A convolution of width one over all channels."""
    named = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    x, weight, bias = named.get("input"), named.get("weight"), named.get("bias")
    if not isinstance(x, Tensor) or not isinstance(weight, Tensor) or x.dim() != weight.dim():
        return None
    if weight.shape[2:].numel() != 1 or weight.shape[1] != x.shape[1]:
        return None
    positions = output.shape[2:].numel()
    channels_last = output.dim() == 4 and output.is_contiguous(memory_format=torch.channels_last)
    stride = positions if output.is_contiguous() else 1 if channels_last else 0
    return LinearCall(weight.flatten(1), bias, None, output, scope, module, stride), None


def _matrices(module: nn.Module) -> tuple[nn.Parameter, ...]:
    """The matrices behind a computed weight, where the module that ran it is a single linear layer."""
    return tuple(p for p in module.parameters() if p.dim() > 1) if isinstance(module, nn.Linear) else ()


def _linear_arguments(
    input: Tensor,  # noqa: A002  torch's name for it
    weight: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias
