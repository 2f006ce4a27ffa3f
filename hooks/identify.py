"""Which linear map a q, k or v comes from: told from what happens, not from names.

A q that enters attention as a view of a linear map's output says by its offset and strides which output features
make up which head, whether projections are separate, fused as `[Q|K|V]`, or interleaved; and that nothing
(rotary, norms) came in between. Where q is no view (a copy, a scaled or rotated one) the usual layouts are tried by
value, once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_monitor.hooks.linears import LinearCall, version_of
from entropy_monitor.hooks.projections import Kind, Layout, Projection, Rows

_VALUE_TOLERANCE = 1e-3  # relative, float32
_VALUE_TOLERANCE_LOW = 2e-2  # relative, bf16 and fp16: their rounding, a few times over
_SAMPLE_ROWS = 8


def find_projection(tensor: Tensor, linears: Sequence[LinearCall]) -> Projection | None:
    """The linear map that `tensor`, `[B, H, T, D]`, is a view of, by storage, offset and strides.

    Costs no arithmetic and no synchronisation. None when it is no view of any output, or when the output was
    changed in place since.
    """
    identity = tensor.untyped_storage()._cdata
    for linear in reversed(linears):
        if linear.storage.cdata != identity or not linear.contiguous:
            continue
        if version_of(tensor) != linear.version:
            return None
        return _from_strides(tensor, linear)
    return None


def find_whole_projection(tensor: Tensor, linears: Sequence[LinearCall]) -> Projection | None:
    """Like `find_projection` for a tensor whose dimensions are in any order: which features, not which tokens."""
    identity = tensor.untyped_storage()._cdata
    for linear in reversed(linears):
        if linear.storage.cdata != identity or not linear.contiguous:
            continue
        out = linear.shape[-1]
        start = tensor.storage_offset() - linear.offset
        inner = sorted(
            (stride, size)
            for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
            if size > 1 and stride % out
        )
        if start < 0 or not 1 <= len(inner) <= 2:
            return None
        (stride, size), (head_stride, heads) = inner[0], inner[1] if len(inner) == 2 else (0, 1)
        layout = Layout(heads, size, start % out, head_stride, stride)
        if layout.last >= out:
            return None
        return Projection(linear.weight, linear.bias, layout, None, None, parameters=linear.parameters)
    return None


def _from_strides(tensor: Tensor, linear: LinearCall) -> Projection | None:
    b, h, t, d = tensor.shape
    sb, sh, st, sd = (s if n > 1 else 0 for s, n in zip(tensor.stride(), tensor.shape, strict=True))
    out = linear.shape[-1]
    start = tensor.storage_offset() - linear.offset
    layout = Layout(h, d, start % out, sh, sd or 1)
    if start < 0 or sb % out or st % out or layout.last >= out:
        return None
    rows = Rows(b, t, start // out, sb // out, st // out)
    return Projection(linear.weight, linear.bias, layout, linear.input, rows, parameters=linear.parameters)


@dataclass(frozen=True)
class Found:
    """What the trial by value settled, so that it need not be repeated: which linear, and how.

    Attributes:
        position: of the linear, among those noted when attention was called.
        layout: which output features make up which head.
        sequence_first: whether the linear's rows run over sequences first.
        kind: see `Projection`.
        factor: see `Projection`.
    """

    position: int
    layout: Layout
    sequence_first: bool
    kind: Kind
    factor: float


def match_projection(tensor: Tensor, linears: Sequence[LinearCall], role: int, group: int) -> Found | None:
    """The linear map that `tensor`, `[B, H, T, D]`, was computed from, by value.

    Tried are separate and fused layouts, in batch-first and sequence-first order; `role` is 0 for q, 1 for k,
    2 for v and `group` how many query heads share a key head. Keys that were repeated for their query heads are
    recognised. Reads values on the host: for the first forward only.
    """
    best: Found | None = None
    candidates = [(tensor, group), *(_unrepeated(tensor) if role and group == 1 else ())]
    for position in reversed(range(len(linears))):
        linear = linears[position]
        output = linear.output
        if output is None or not linear.contiguous:
            continue
        for candidate, shared in candidates:
            for layout in _layouts(candidate, linear.shape[-1], role, shared):
                for sequence_first in (False, True):
                    rows = _rows(candidate, sequence_first)
                    if linear.shape[:-1].numel() != rows.sequences * rows.tokens:
                        continue
                    agreed = _agree(candidate, output, layout, rows)
                    if agreed is None:
                        continue
                    found = Found(position, layout, sequence_first, *agreed)
                    if found.kind == "plain":
                        return found
                    best = best or found
    return best


def settled_projection(found: Found, tensor: Tensor, linears: Sequence[LinearCall]) -> Projection | None:
    """The projection that `match_projection` found, in a later forward, whatever its batch and length."""
    if found.position >= len(linears):
        return None
    linear = linears[found.position]
    rows = _rows(tensor, found.sequence_first)
    fits = linear.shape[:-1].numel() == rows.sequences * rows.tokens
    if not fits or found.layout.last >= linear.shape[-1]:
        return None
    return Projection(
        linear.weight,
        linear.bias,
        found.layout,
        linear.input,
        rows,
        found.kind,
        found.factor,
        linear.parameters,
    )


def _rows(tensor: Tensor, sequence_first: bool) -> Rows:
    b, t = tensor.shape[0], tensor.shape[2]
    return Rows(b, t, 0, 1, b) if sequence_first else Rows(b, t, 0, t, 1)


def _unrepeated(tensor: Tensor) -> Iterator[tuple[Tensor, int]]:
    """`tensor` with one head of each group, for every grouping in which the heads of a group are equal."""
    heads = tensor.shape[1]
    for group in range(2, heads + 1):
        if heads % group == 0:
            kept = tensor[:, ::group]
            if bool((tensor.unflatten(1, (-1, group)) == kept.unsqueeze(2)).all()):
                yield kept, group


def _layouts(tensor: Tensor, out: int, role: int, group: int) -> Iterator[Layout]:
    """The usual ways in which `out` features hold the heads of `tensor`."""
    heads, d = tensor.shape[1], tensor.shape[-1]
    if out == heads * d:
        yield Layout(heads, d, 0, d)
    if out == 3 * heads * d:
        yield Layout(heads, d, role * heads * d, d)  # [Q|K|V]
        yield Layout(heads, d, role * d, 3 * d)  # [H, 3, d_head]
        yield Layout(heads, d, role, 3 * d, 3)  # [H, d_head, 3]
    if out == 2 * heads * d and role > 0:
        yield Layout(heads, d, (role - 1) * heads * d, d)  # [K|V]
        yield Layout(heads, d, (role - 1) * d, 2 * d)
    queries = heads if role == 0 else heads * group
    keys = queries // group
    if group > 1 and out == (queries + 2 * keys) * d:
        base = 0 if role == 0 else (queries + (role - 1) * keys) * d
        yield Layout(heads, d, base, d)  # [Q|K|V] with fewer key heads


def _agree(tensor: Tensor, output: Tensor, layout: Layout, rows: Rows) -> tuple[Kind, float] | None:
    """Whether `tensor` is this part of `output`, up to a factor, or up to a rotation of each row."""
    flat = output.detach().reshape(-1, output.shape[-1])
    step = max(1, rows.tokens // _SAMPLE_ROWS)
    seen = tensor.detach()[:, :, ::step].float()
    so, sf = flat.stride()
    made = flat.as_strided(
        (rows.sequences, layout.heads, rows.tokens, layout.head_size),
        (rows.batch * so, layout.head_stride * sf, rows.token * so, layout.stride * sf),
        flat.storage_offset() + rows.base * so + layout.base * sf,
    )[:, :, ::step].float()
    low = min(torch.finfo(tensor.dtype).bits, torch.finfo(output.dtype).bits) < 32
    tolerance = _VALUE_TOLERANCE_LOW if low else _VALUE_TOLERANCE
    power = made.square().sum()
    if not bool(power > 0) or not bool(torch.isfinite(power)):
        return None
    factor = float((seen * made).sum() / power)
    if bool((seen - factor * made).norm() <= tolerance * seen.norm()) and factor != 0:
        return "plain", 1.0 if abs(factor - 1) < tolerance else factor
    seen_norm, made_norm = seen.norm(dim=-1), made.norm(dim=-1)
    ratio = float((seen_norm * made_norm).sum() / made_norm.square().sum())
    if bool((seen_norm - ratio * made_norm).norm() <= tolerance * seen_norm.norm()):
        return "rotated", 1.0 if abs(ratio - 1) < tolerance else ratio
    return None
