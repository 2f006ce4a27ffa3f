"""From the origin of a q or k to its projection: which weights make up which head, applied to what."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from entropy_monitor.hooks.lineage import Origin
from entropy_monitor.hooks.linears import LinearCall, LinearMap
from entropy_monitor.hooks.projections import Projection, Rows
from entropy_monitor.hooks.storage import storage_of, version_of

_TOLERANCE = 1e-3  # relative, float32
_TOLERANCE_LOW = 2e-2  # relative, bf16 and fp16: their rounding, a few times over
_SAMPLE = 8  # tokens, and sequences, that are looked at
_ENOUGH = 16  # numbers that have to agree


@torch.no_grad()
def projection_of(tensor: Tensor, origin: Origin, root: LinearMap | None) -> Projection | None:
    """The projection that made `tensor`, `[B, H, T, D]`.

    Whether anything beside a factor came between is read from the values, without waiting for the device.

    Args:
        tensor: the q or k that enters the product, key heads perhaps repeated for their queries.
        origin: where it comes from.
        root: the linear map that it is a view of, if it is one.
    """
    linear = origin.linear
    b, heads, t, d = tensor.shape
    layout = origin.features.layout(d)
    if layout is None:
        return None
    found = Projection(linear.weight, linear.bias, layout, linear.input, None, math.nan, linear.parameters)
    if layout.heads != heads:
        if linear.shape.numel() // linear.features == b * heads * t and layout.heads == 1:
            return replace(
                found, layout=replace(layout, heads=heads, head_stride=0)
            )  # one map for every head
        if heads % layout.heads:
            return None
        kept = tensor[:, :: heads // layout.heads]
        repeated = (torch.unflatten(tensor, 1, (layout.heads, -1)) == kept.unsqueeze(2)).all()
        found, tensor = replace(found, certain=_nan_unless(repeated)), kept
    if root is linear and isinstance(linear, LinearCall):
        rows = _rows_of_view(tensor, linear)
        if rows is not None and version_of(tensor) == linear.version != -1:
            return replace(found, rows=rows, factor=1.0)
    else:
        rows = _rows_of_shape(b, t, linear.shape[:-1])
    found = replace(found, rows=rows)
    return replace(found, factor=_factor(tensor, found))


def has_rows_of(tensor: Tensor, origin: Origin) -> bool:
    """Whether the rows of `[B, H, T, D]` are those of its projection; waits for the device.

    They are where all norms agree up to one factor, which rotary embeddings keep; or where, of the first
    token, which rotary embeddings leave alone, directions agree, up to a factor of each feature after a norm.
    """
    linear, layout = origin.linear, origin.features.layout(tensor.shape[-1])
    if layout is None:
        return False
    (b, _, t, _), shape = tensor.shape, linear.shape[:-1]
    orders = [_rows_of_shape(b, t, shape)]
    if tuple(shape) == (t, b) == (b, t):  # sequence first, as likely
        orders.append(Rows(b, t, 0, 1, b))
    return any(
        _has_rows(tensor, Projection(linear.weight, linear.bias, layout, linear.input, rows))
        for rows in orders
    )


def _has_rows(tensor: Tensor, projection: Projection) -> bool:
    seen, made = _sampled(tensor, projection)
    if made is None or made.shape != seen.shape:
        return False
    tolerance = _tolerance(tensor, projection)
    if _agree(seen.norm(dim=-1), made.norm(dim=-1), tolerance):
        return True
    seen, made = seen[:, :, 0].flatten(0, 1), made[:, :, 0].flatten(0, 1)
    if len(seen) < 2 or seen.numel() < _ENOUGH:
        return False
    unit = F.normalize(made, dim=-1)
    if _agree(F.normalize(seen, dim=-1), unit, tolerance):
        return True
    of_feature = (seen * unit).sum(0) / unit.square().sum(0)
    return bool((seen - of_feature * unit).norm() <= tolerance * seen.norm())


def _agree(seen: Tensor, made: Tensor, tolerance: float) -> bool:
    ratio = (seen * made).sum() / made.square().sum()
    return bool((seen - ratio * made).norm() <= tolerance * seen.norm())


def _rows_of_view(tensor: Tensor, linear: LinearCall) -> Rows | None:
    out = linear.features
    if linear.feature_stride != 1 or storage_of(tensor) is None:
        return None
    (b, _, t, _), (sb, _, st, _) = tensor.shape, tensor.stride()
    sb, st = sb if b > 1 else 0, st if t > 1 else 0
    if sb % out or st % out:
        return None
    return Rows(b, t, (tensor.storage_offset() - linear.offset) // out, sb // out, st // out)


def _rows_of_shape(b: int, t: int, shape: torch.Size) -> Rows | None:
    if shape.numel() != b * t:
        return None
    sequence_first = len(shape) == 2 and tuple(shape) == (t, b) != (b, t)
    return Rows(b, t, 0, 1, b) if sequence_first else Rows(b, t, 0, t, 1)


def _factor(tensor: Tensor, projection: Projection) -> Tensor | float:
    """The c where `tensor` is c times what the projection makes of its input; NaN where it is not."""
    seen, made = _sampled(tensor, projection)
    if made is None:
        return math.nan
    power = made.square().sum()
    factor = (seen * made).sum() / power
    agree = (seen - factor * made).norm() <= _tolerance(tensor, projection) * seen.norm()
    return torch.where(agree & (power > 0) & (factor != 0), factor, math.nan)


def _sampled(tensor: Tensor, projection: Projection) -> tuple[Tensor, Tensor | None]:
    """Some rows of `tensor`, and what the projection makes of the same rows of its input."""
    b, _, t, _ = tensor.shape
    i, j = (slice(None, None, max(1, n // _SAMPLE)) for n in (b, t))
    seen = tensor.detach()[i, :, j].float()
    x = projection.inputs()
    if x is None or seen.numel() < _ENOUGH:
        return seen, None
    with torch.autocast(tensor.device.type, enabled=False):
        made = x[i, j].float().unsqueeze(1) @ projection.head_weights()
        bias = projection.head_biases()
        return seen, made if bias is None else made + bias.unsqueeze(1)


def _tolerance(tensor: Tensor, projection: Projection) -> float:
    dtypes = [x.dtype for x in (tensor, projection.weight, projection.input) if x is not None]
    low = torch.is_autocast_enabled(tensor.device.type) or any(torch.finfo(d).bits < 32 for d in dtypes)
    return _TOLERANCE_LOW if low else _TOLERANCE


def _nan_unless(condition: Tensor) -> Tensor:
    one = torch.ones((), device=condition.device)
    return torch.where(condition, one, math.nan)
