"""Which output features of a linear map a tensor holds, told from its memory or from what it was made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from entropy_monitor.hooks.projections import Layout

if TYPE_CHECKING:
    from entropy_monitor.hooks.linears import LinearCall


@dataclass(frozen=True)
class Features:
    """Output features `base + Σ i_d · stride_d`, `0 ≤ i_d < size_d`.

    Attributes:
        base: the first feature.
        dims: (size, stride) of one or two dimensions, smallest stride first.
    """

    base: int
    dims: tuple[tuple[int, int], ...]

    @property
    def count(self) -> int:
        """How many features these are."""
        return math.prod(n for n, _ in self.dims)

    def whole(self) -> Layout:
        """The features in their own groups, whichever of the groups are heads."""
        (n, s), (heads, head_stride) = self.dims if len(self.dims) == 2 else (*self.dims, (1, 0))
        return Layout(heads, n, self.base, head_stride, s)

    def layout(self, head_size: int) -> Layout | None:
        """The features as heads of `head_size`; None where they do not divide so."""
        if len(self.dims) == 1:
            ((n, s),) = self.dims
            return None if n % head_size else Layout(n // head_size, head_size, self.base, head_size * s, s)
        for (n, s), (heads, head_stride) in (self.dims, self.dims[::-1]):
            if n == head_size:
                return Layout(heads, n, self.base, head_stride, s)
        ((n, s), (groups, group_stride)) = self.dims
        if n % head_size == 0 and n * s <= group_stride:  # several heads in each group, side by side
            heads = groups * (n // head_size)
            return Layout(heads, head_size, self.base, head_size * s, s, groups, group_stride)
        joined = _joined(self.dims)
        return Features(self.base, joined).layout(head_size) if len(joined) == 1 else None

    def merged(self, other: Features) -> Features | None:
        """What a tensor holds that was made from both, such as the two halves of a rotary embedding."""
        if self == other:
            return self
        low, high = sorted((self, other), key=lambda f: f.base)
        if len(low.dims) != len(high.dims):
            return None
        differ = [i for i, (a, b) in enumerate(zip(low.dims, high.dims, strict=True)) if a != b]
        if len(differ) > 1:
            return None
        for i in differ or range(len(low.dims)):
            (n, s), (m, t) = low.dims[i], high.dims[i]
            gap = high.base - low.base
            if s == t and gap == n * s:
                joined = (n + m, s)  # one after the other
            elif s == t and n == m and s % 2 == 0 and gap == s // 2:
                joined = (2 * n, s // 2)  # interleaved
            elif s == t and gap % s == 0 and gap // s + m <= n:
                joined = (n, s)  # one within the other
            elif gap == 0 and s == t:
                joined = (max(n, m), s)
            else:
                continue
            return Features(low.base, (*low.dims[:i], joined, *low.dims[i + 1 :]))
        gap = high.base - low.base
        if len(low.dims) == 1 and not differ and 0 < gap < low.dims[0][1]:  # one feature of each head, twice
            return Features(low.base, ((2, gap), *low.dims))
        return None


def features_of(tensor: Tensor, linear: LinearCall) -> Features | None:
    """Which features a view of a linear map's output holds; None where its strides do not tell."""
    step, out = linear.feature_stride, linear.features
    if not step:
        return None
    if tensor.is_complex() and not linear.weight.is_complex():  # pairs of features
        tensor = torch.view_as_real(tensor.conj() if tensor.is_conj() else tensor)
    period = step * out
    base, within = divmod((int(tensor.storage_offset()) - linear.offset) % period, step)
    if tensor.storage_offset() < linear.offset or (step == 1 and within):
        return None
    inner = []
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if not is_inner(size, stride, linear):
            continue
        if stride % step:
            return None
        s = stride // step
        # Heads folded into the batch run on into the next row.
        inner.append((out // s if size * s > out and (size * s) % out == 0 else size, s))
    dims = tuple(sorted(inner, key=lambda d: d[1])) or ((1, 1),)
    if len(dims) > 2:
        dims = _joined(dims)
    if len(dims) > 2 or base + sum((n - 1) * s for n, s in dims) >= out:
        return None
    return Features(base, dims)


def features_taken(tensor: Tensor, index: Any, linear: LinearCall) -> Features | None:
    """Which features `tensor[index]` holds, a copy made by lists in the index; None where that is not told.

    Args:
        tensor: a view of the linear map's output.
        index: of numbers, slices and lists; tensors would have to be read.
        linear: the map.
    """
    parts = index if isinstance(index, tuple) else (index,)
    if features_of(tensor, linear) is None or any(isinstance(part, Tensor) for part in parts):
        return None
    step = linear.feature_stride
    first = ((int(tensor.storage_offset()) - linear.offset) // step) % linear.features
    sizes = tensor.shape
    inner = [is_inner(n, s, linear) for n, s in zip(sizes, tensor.stride(), strict=True)]
    strides = [s // step if i else 0 for i, s in zip(inner, tensor.stride(), strict=True)]
    # Numbers, not tensors: what is looked at here may be fake.
    numbers = np.arange(first, first + linear.features)
    bytes_apart = tuple(s * numbers.itemsize for s in strides)
    numbers = np.lib.stride_tricks.as_strided(numbers, tuple(sizes), bytes_apart, writeable=False)
    taken = numbers[index]
    if not isinstance(taken, np.ndarray) or not taken.size:
        return None
    base, dims = int(taken.flat[0]), []
    expected = np.full_like(taken, base)
    for dim, size in enumerate(taken.shape):
        if size < 2:
            continue
        stride = int(np.moveaxis(taken, dim, 0)[1].flat[0]) - base
        expected = expected + (np.arange(size) * stride).reshape(-1, *(1,) * (taken.ndim - dim - 1))
        if stride:
            dims.append((size, stride))
    dims.sort(key=lambda d: d[1])
    told = len(dims) <= 2 and all(s > 0 for _, s in dims) and np.array_equal(taken, expected)
    return Features(base, tuple(dims) or ((1, 1),)) if told else None


def is_inner(size: int, stride: int, linear: LinearCall) -> bool:
    """Whether a dimension of a view of a linear map's output runs over features, not over rows."""
    return (
        size > 1
        and stride >= linear.feature_stride
        and stride % (linear.feature_stride * linear.features) != 0
    )


def _joined(dims: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """The two innermost dimensions as one, where they lie one after the other."""
    (n, s), (m, t) = dims[0], dims[1]
    return ((n * m, s), *dims[2:]) if t == n * s else dims
