"""From the origin of a q or k to its projection: which weights make up which head, applied to what.

The first time that a layer's projection is found, values are looked at: see `agreement`. That waits for the
device once; the verdict is kept. Where there are too few numbers to tell, structure alone speaks.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import replace

import torch
from torch import Tensor

from entropy_monitor.hooks.features import is_inner
from entropy_monitor.hooks.latent import composed, features_slice, own_parameters, side_by_side, through
from entropy_monitor.hooks.lineage import Joined, Origin
from entropy_monitor.hooks.linears import LinearCall, LinearMap
from entropy_monitor.hooks.projections import Layout, Projection, parameters_of
from entropy_monitor.hooks.samples import (
    SAMPLE,
    TOLERANCE,
    TOLERANCE_LOW,
    factor_of,
    looser,
    nan_unless,
    rows_of_shape,
    rows_of_view,
    sampled,
    tolerance_of,
)
from entropy_monitor.hooks.sharding import is_sharded, splits_inputs
from entropy_monitor.hooks.storage import is_freed, storage_of, version_of
from entropy_monitor.hooks.verdicts import NoProjectionError, Verdicts

NO_HEADS = "{} heads of {} features do not lie in {} features of a linear map's output in a way that is known"
DISAGREE = "{} are not what the linear map behind them gives, up to rotary embeddings and norms"
LATENT = "what enters the second map of a low-rank chain is not what the first one gives, up to a norm"
INPUTS = "{} are a sum of two linear maps of different inputs, such as an adapter's under dropout"
UNKNOWN_INPUTS = "{} are a sum of two linear maps whose inputs are not known any more"
REGISTERED = "{} are not what the registered projection gives, up to rotary embeddings and norms"
FREED = "the weights behind {} were freed before attention ran, as FSDP does where a linear layer is a unit"
SPLIT_INPUTS = "the weights behind {} are split over processes along their inputs"
SPLIT_SUM = "{} are made by several weights, some of them split over processes"
REGISTERED_SPLIT = "the weights that were registered for {} are split over processes or freed"
OVER_ROWS = "{} are products over tokens: attention runs over features, and no weights bound it"
PARTS = "{} are put together from parts that do not all come from linear maps of one input"


@torch.no_grad()
def projection_of(
    tensor: Tensor, origin: Origin, root: LinearMap | None, verdicts: Verdicts, *, latent: bool = True
) -> Projection:
    """The projection that made `tensor`, `[B, H, T, D]`.

    Whether anything beside a factor came between is read from the values each time, without waiting for the
    device; whether anything beside rotary embeddings and norms did, once.

    Args:
        tensor: the q or k that enters the product, key heads perhaps repeated for their queries.
        origin: where it comes from.
        root: the linear map that it is a view of, if it is one.
        verdicts: what values said before.
        latent: whether a chain of maps counts as one.

    Raises:
        NoProjectionError: if none is known.
    """
    if isinstance(origin, Joined):
        return _projection_of_parts(tensor, origin, verdicts)
    check_here(origin.linear)
    found = _last_of_chain(tensor, origin, root, verdicts)
    if not latent or origin.linear.latent is None:
        return found
    _check_latent(origin.linear, origin.linear.latent, verdicts)
    return through(found, origin.linear)


def _last_of_chain(tensor: Tensor, origin: Origin, root: LinearMap | None, verdicts: Verdicts) -> Projection:
    linear = origin.linear
    b, heads, t, d = tensor.shape
    layout = origin.features.layout(d)
    if layout is None:
        raise NoProjectionError(NO_HEADS.format(heads, d, origin.features.count))
    if root is linear and isinstance(linear, LinearCall) and _runs_over_rows(tensor, linear):
        raise NoProjectionError(OVER_ROWS)
    _check_sum(linear, verdicts)
    found = Projection(
        *composed(linear),
        layout,
        linear.input,
        None,
        math.nan,
        own_parameters(linear),
        shard=linear.shard,
        rounded=linear.rounded,
    )
    if layout.heads != heads:
        shared = linear.shape.numel() // linear.features == b * heads * t and heads in linear.shape[:-1]
        if shared and layout.heads == 1:
            return replace(found, layout=replace(layout, heads=heads, head_stride=0))  # one for every head
        if heads % layout.heads:
            raise NoProjectionError(NO_HEADS.format(heads, d, origin.features.count))
        kept = tensor[:, :: heads // layout.heads]
        repeated = (torch.unflatten(tensor, 1, (layout.heads, -1)) == kept.unsqueeze(2)).all()
        found, tensor = replace(found, certain=nan_unless(repeated)), kept
    if root is linear and isinstance(linear, LinearCall):
        rows = rows_of_view(tensor, linear)
        if rows is not None and version_of(tensor) == linear.version != -1:
            return replace(found, rows=rows, factor=1.0)
    else:
        rows = rows_of_shape(b, t, linear.shape[:-1])
    found = replace(found, rows=rows)
    seen, made = sampled(tensor, found)
    tolerance = tolerance_of(tensor, found)
    question = ("agrees", linear.module, origin.features, tuple(map(id, found.parameters)))
    verdicts.require(question, seen, made, looser(tolerance, tensor), DISAGREE)
    return replace(found, factor=factor_of(seen, made, tolerance))


def _runs_over_rows(tensor: Tensor, linear: LinearCall) -> bool:
    """Whether the last dimension of a view runs over tokens and the one before over features, as in XCA."""
    (t, d), (st, sd) = tensor.shape[-2:], tensor.stride()[-2:]
    return is_inner(t, st, linear) and not is_inner(d, sd, linear)


def _projection_of_parts(tensor: Tensor, joined: Joined, verdicts: Verdicts) -> Projection:
    """The projection of heads that are put together from parts along their features."""
    heads = tensor.shape[1]
    if joined.width != tensor.shape[-1]:
        raise NoProjectionError(PARTS)
    pieces = torch.split(tensor, joined.widths, -1)
    found = [
        projection_of(piece, part, None, verdicts)
        for piece, (_, part) in zip(pieces, joined.parts, strict=True)
    ]
    if len({p.weight.shape[1] for p in found}) != 1 or any(heads % p.layout.heads for p in found):
        raise NoProjectionError(PARTS)
    if not all(p.is_whole for p in found):
        raise NoProjectionError(SPLIT_SUM)
    return side_by_side(found, heads, joined.widths)


def check_here(linear: LinearMap) -> None:
    """Raise where this process does not have what a map's heads are made with.

    Raises:
        NoProjectionError: with why.
    """
    if any(is_freed(weight) for weight in linear.weights()):
        raise NoProjectionError(FREED)
    if linear.shard is not None and splits_inputs(linear.weight, linear.shard):
        raise NoProjectionError(SPLIT_INPUTS)
    if linear.is_split and (linear.added or linear.latent is not None):
        raise NoProjectionError(SPLIT_SUM)


def _check_sum(linear: LinearMap, verdicts: Verdicts) -> None:
    """The maps of a sum must have had the same input."""
    for _, other in linear.added:
        first = other.from_width(linear.weight.shape[1])
        x, y = linear.input, None if first is None else first.input
        if x is None or y is None:
            raise NoProjectionError(UNKNOWN_INPUTS)
        x, y = x.flatten(0, -2), y.flatten(0, -2)  # Conv1D flattens its input, an adapter beside it does not
        if x.shape == y.shape and storage_of(x) == storage_of(y) and x.storage_offset() == y.storage_offset():
            continue
        low = min(torch.finfo(z.dtype).bits for z in (x, y)) < 32
        question = ("same input", linear.module, other.module, tuple(map(id, own_parameters(linear))))
        # Dropout comes and goes with the mode.
        key = (question, linear.module.training)
        verdicts.require_same(key, x, y, TOLERANCE_LOW if low else TOLERANCE, INPUTS)


def _check_latent(linear: LinearMap, inner: Origin, verdicts: Verdicts) -> None:
    """What enters the last map of a chain must be what the one before made, perhaps normalised."""
    seen, x = linear.input, inner.linear.input
    if seen is None or x is None or seen.shape[:-1].numel() != x.shape[:-1].numel():
        return
    rows = slice(None, None, max(1, x.shape[:-1].numel() // SAMPLE**2))
    seen, x = (y.detach().flatten(0, -2)[rows].float() for y in (seen, x))
    with torch.autocast(x.device.type, enabled=False):
        weight, bias = composed(inner.linear)
        part = features_slice(inner.features)
        made = x @ weight[part].float().T
        made = made if bias is None else made + bias[part].float()
    found = Projection(weight, bias, inner.features.whole(), inner.linear.input, None)
    tolerance = looser(tolerance_of(seen, found), seen)
    question = ("latent", linear.module, inner.features, tuple(map(id, inner.linear.parameters)))
    verdicts.require(question, seen[None, None], made[None, None], tolerance, LATENT)


def given_projection(
    tensor: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    origin: Origin | None,
    root: LinearMap | None,
    verdicts: Verdicts,
    question: Hashable,
    known: Projection | None = None,
) -> Projection:
    """A projection that the user named, checked where its input is known.

    Args:
        tensor: the q or k that enters the product, `[B, H, T, D]`.
        weight: `[H, d_model, D]` of each head; fewer where key heads were repeated for their queries.
        bias: `[H, D]`, or None.
        origin: where the tensor comes from, if that is known.
        root: the linear map that it is a view of, if it is one.
        verdicts: what values said before.
        question: what they are asked by.
        known: the projection that the call itself names, if it does: its input is this one's.

    Raises:
        NoProjectionError: if it does not fit the tensor, or does not make it.
    """
    if is_sharded(weight) or is_freed(weight):
        raise NoProjectionError(REGISTERED_SPLIT)
    heads, width, d = weight.shape
    b, h, t, size = tensor.shape
    if size != d or h % heads:
        raise NoProjectionError(
            f"{heads} heads of {d} features were registered for {{}}, which have {h} heads of {size} features"
        )
    found = Projection(
        weight.transpose(1, 2).flatten(0, 1),
        None if bias is None else bias.flatten(),
        Layout(heads, d, 0, d),
        None,
        None,
        math.nan,
        parameters_of(weight),
    )
    if heads != h:
        kept = tensor[:, :: h // heads]
        repeated = (torch.unflatten(tensor, 1, (heads, -1)) == kept.unsqueeze(2)).all()
        found, tensor = replace(found, certain=nan_unless(repeated)), kept
    linear = None if origin is None or isinstance(origin, Joined) else origin.linear.from_width(width)
    x, rows = (None, None) if known is None else (known.input, known.rows)
    if known is None and linear is not None:
        x = linear.input
        if root is linear and isinstance(linear, LinearCall):
            rows = rows_of_view(tensor, linear)
        else:
            rows = rows_of_shape(b, t, linear.shape[:-1])
    if x is None or x.shape[-1] != width:
        return found
    rounded = None if linear is None else linear.rounded
    found = replace(found, input=x, rows=rows, rounded=rounded)
    seen, made = sampled(tensor, found)
    tolerance = tolerance_of(tensor, found)
    verdicts.require(question, seen, made, looser(tolerance, tensor), REGISTERED)
    return replace(found, factor=factor_of(seen, made, tolerance))
