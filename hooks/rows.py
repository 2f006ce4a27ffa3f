"""Whether tensors hold the rows that a projection made, in one order or another."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from entropy_monitor.hooks.agreement import agree_up_to_factor
from entropy_monitor.hooks.latent import composed
from entropy_monitor.hooks.lineage import Origin
from entropy_monitor.hooks.projections import Projection, Rows
from entropy_monitor.hooks.samples import ENOUGH, rows_of_shape, sampled, tolerance_of


def has_rows_of(tensor: Tensor, origin: Origin) -> bool:
    """Whether the rows of `[B, H, T, D]` are those of its projection; waits for the device.

    They are where all norms agree up to one factor, which rotary embeddings keep; or where, of the first
    token, which rotary embeddings leave alone, directions agree, up to a factor of each feature after a norm.
    """
    linear, layout = origin.linear, origin.features.layout(tensor.shape[-1])
    if layout is None:
        return False
    (b, _, t, _), shape = tensor.shape, linear.shape[:-1]
    orders = [rows_of_shape(b, t, shape)]
    if tuple(shape) == (t, b) == (b, t):  # sequence first, as likely
        orders.append(Rows(b, t, 0, 1, b))
    weight, bias = composed(linear)
    return any(_has_rows(tensor, Projection(weight, bias, layout, linear.input, rows)) for rows in orders)


def _has_rows(tensor: Tensor, projection: Projection) -> bool:
    seen, made = sampled(tensor, projection)
    if made is None or made.shape != seen.shape:
        return False
    tolerance = tolerance_of(tensor, projection)
    if agree_up_to_factor(seen.norm(dim=-1), made.norm(dim=-1), tolerance):
        return True
    seen, made = seen[:, :, 0].flatten(0, 1), made[:, :, 0].flatten(0, 1)
    if len(seen) < 2 or seen.numel() < ENOUGH:
        return False
    unit = F.normalize(made, dim=-1)
    if agree_up_to_factor(F.normalize(seen, dim=-1), unit, tolerance):
        return True
    of_feature = (seen * unit).sum(0) / unit.square().sum(0)
    return bool((seen - of_feature * unit).norm() <= tolerance * seen.norm())
