"""Projections that more than one linear map made: low-rank chains, adapters, heads put together from parts.

Latent attention (DeepSeek) makes q and k by two maps with a norm between them, `W_b · norm(W_a x)`, and puts
each key together from a part of its own and a rotary part that all heads share. A low-rank adapter (LoRA)
adds the output of such a chain to that of a weight: `W x + c · B A x`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from entropy_monitor.hooks.features import Features
from entropy_monitor.hooks.linears import LinearMap
from entropy_monitor.hooks.projections import Layout, Projection

Composed = tuple[Tensor, Tensor | None]
"""Weight `[out, in]` and bias `[out]`."""


def composed(linear: LinearMap, width: int | None = None) -> Composed:
    """The map with what was added to it, from an input of `width`: its own, or that of a chain's first map.

    Norms between the maps of a chain are left out.
    """
    if not linear.added and (width is None or linear.latent is None):
        return linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
    with torch.autocast(linear.weight.device.type, enabled=False):
        return _composed(linear, width)


def _composed(linear: LinearMap, width: int | None) -> Composed:
    weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
    for factor, other in linear.added:
        w, b = _composed(other, linear.weight.shape[1])
        weight = weight.float() + factor * w.float()
        bias = _sum(bias, None if b is None else factor * b.float())
    if width is None or weight.shape[1] == width or linear.latent is None:
        return weight, bias
    inner = linear.latent
    w, b = _composed(inner.linear, width)
    part = features_slice(inner.features)
    spread = None if b is None else weight.float() @ b[part].float()
    return weight.float() @ w[part].float(), _sum(bias, spread)


def parameters_behind(linear: LinearMap) -> tuple[nn.Parameter, ...]:
    """Of a map, of what was added to it, and of the maps that made its input in a chain."""
    found = list(linear.parameters)
    for _, other in linear.added:
        found += parameters_behind(other)
    if linear.latent is not None:
        found += parameters_behind(linear.latent.linear)
    return tuple(dict.fromkeys(found))


def own_parameters(linear: LinearMap) -> tuple[nn.Parameter, ...]:
    """The parameters of a map and of what was added to it."""
    added = (p for _, other in linear.added for p in parameters_behind(other))
    return tuple(dict.fromkeys((*linear.parameters, *added)))


def through(found: Projection, linear: LinearMap) -> Projection:
    """The projection from the input of the first map of a chain."""
    if linear.latent is None:
        return found
    first = linear.latent.linear
    weight, bias = composed(linear, first.weight.shape[1])
    return replace(
        found,
        weight=weight,
        bias=bias,
        input=first.input,
        factor=math.nan,
        parameters=parameters_behind(linear),
    )


def side_by_side(parts: list[Projection], heads: int, widths: list[int]) -> Projection:
    """The projection of heads that are put together from parts along their features.

    Args:
        parts: the projection of each part, from inputs of one width; key heads may be fewer than `heads`.
        heads: how many heads there are.
        widths: of the parts.
    """
    inputs = {None if p.input is None else (p.input.data_ptr(), p.input.shape) for p in parts}
    weights = [p.head_weights().repeat_interleave(heads // p.layout.heads, 0) for p in parts]
    bias = None
    if any(p.bias is not None for p in parts):
        bias = torch.cat([_head_bias(p, heads) for p in parts], -1).flatten()
    d = sum(widths)
    return Projection(
        torch.cat(weights, -1).transpose(1, 2).flatten(0, 1),
        bias,
        Layout(heads, d, 0, d),
        parts[0].input if len(inputs) == 1 else None,
        None,
        math.nan,
        tuple(dict.fromkeys(q for p in parts for q in p.parameters)),
    )


def features_slice(features: Features) -> slice:
    """Features in one run, as a slice."""
    ((n, step),) = features.dims
    return slice(features.base, features.base + (n - 1) * step + 1, step)


def _head_bias(projection: Projection, heads: int) -> Tensor:
    bias, at = projection.head_biases(), projection.layout
    if bias is None:
        return projection.weight.new_zeros(heads, at.head_size, dtype=torch.float32)
    return bias.repeat_interleave(heads // at.heads, 0)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else b
    return a.float() + b
