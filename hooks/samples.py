"""Samples of queries and keys, beside what a projection makes of the same rows of its input."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from entropy_monitor.hooks.linears import LinearCall
from entropy_monitor.hooks.projections import Projection, Rows
from entropy_monitor.hooks.storage import storage_of

ENOUGH = 16  # numbers that have to agree
SAMPLE = 8  # tokens, and sequences, that are looked at
TOLERANCE = 1e-3  # relative, float32
TOLERANCE_LOW = 2e-2  # relative, bf16 and fp16: their rounding, a few times over
_TOLERANCE_CHECK = 1e-2  # of the verdict, off the CPU, where float32 products may be rounded to TF32


def rows_of_view(tensor: Tensor, linear: LinearCall) -> Rows | None:
    """The rows of a view `[B, H, T, D]` of a linear map's output, told from its memory."""
    out = linear.features
    if linear.feature_stride != 1 or storage_of(tensor) is None:
        return None
    (b, _, t, _), (sb, _, st, _) = tensor.shape, tensor.stride()
    sb, st = sb if b > 1 else 0, st if t > 1 else 0
    if sb % out or st % out:
        return None
    return Rows(b, t, (tensor.storage_offset() - linear.offset) // out, sb // out, st // out)


def rows_of_shape(b: int, t: int, shape: torch.Size) -> Rows | None:
    """The rows of a copy, told from the shape of the linear map's output without its features."""
    if shape.numel() != b * t:
        return None
    sequence_first = len(shape) == 2 and tuple(shape) == (t, b) != (b, t)
    return Rows(b, t, 0, 1, b) if sequence_first else Rows(b, t, 0, t, 1)


def factor_of(seen: Tensor, made: Tensor | None, tolerance: float) -> Tensor | float:
    """The c where what was seen is c times what the projection makes of its input; NaN where it is not."""
    if made is None:
        return math.nan
    power = made.square().sum()
    factor = (seen * made).sum() / power
    agreed = (seen - factor * made).norm() <= tolerance * seen.norm()
    return torch.where(agreed & (power > 0) & (factor != 0), factor, math.nan)


def sampled(tensor: Tensor, projection: Projection) -> tuple[Tensor, Tensor | None]:
    """Some rows of `tensor`, and what the projection makes of the same rows of its input."""
    b, _, t, _ = tensor.shape
    i, j = (slice(None, None, max(1, n // SAMPLE)) for n in (b, t))
    seen = tensor.detach()[i, :, j].float()
    x = projection.inputs()
    if x is None or seen.numel() < ENOUGH:
        return seen, None
    with torch.autocast(tensor.device.type, enabled=False):
        made = x[i, j].float().unsqueeze(1) @ projection.head_weights()
        bias = projection.head_biases()
        return seen, made if bias is None else made + bias.unsqueeze(1)


def tolerance_of(tensor: Tensor, projection: Projection) -> float:
    """How far apart what was seen and what the projection makes may be, relative, by their dtypes."""
    dtypes = [x.dtype for x in (tensor, projection.weight, projection.input) if x is not None]
    if projection.rounded is not None:
        dtypes.append(projection.rounded)
    low = torch.is_autocast_enabled(tensor.device.type) or any(torch.finfo(d).bits < 32 for d in dtypes)
    return TOLERANCE_LOW if low else TOLERANCE


def looser(tolerance: float, tensor: Tensor) -> float:
    """A tolerance that also lets pass products rounded to TF32."""
    return tolerance if tensor.device.type == "cpu" else max(tolerance, _TOLERANCE_CHECK)


def nan_unless(condition: Tensor) -> Tensor:
    """1 where a condition holds, else NaN, without waiting for the device."""
    one = torch.ones((), device=condition.device)
    return torch.where(condition, one, math.nan)
