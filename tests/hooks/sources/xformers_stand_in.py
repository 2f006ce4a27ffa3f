"""A package that speaks as xformers does and computes densely, for machines without its kernels."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def dense_logits(q: Tensor, k: Tensor, bias: Any, scale: float | None) -> Tensor:
    """`[B, …heads, T, S]` of q `[B, T, …heads, D]`; float64."""
    q, k = (x.double().movedim(1, -2) for x in (q, k))
    u = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if isinstance(bias, Tensor):
        return u + bias.double()
    return u if bias is None else u + bias.dense(u.shape[-2], u.shape[-1])


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: Any = None,
) -> Tensor:
    return _Attend.apply(query, key, value, attn_bias, scale)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Any, scale: Any) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.options = (bias, scale)
        p = dense_logits(q, k, bias, scale).softmax(-1).nan_to_num(0.0)
        return (p @ v.double().movedim(1, -2)).movedim(-2, 1).to(q.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        q, k, v = (x.detach().requires_grad_() for x in ctx.saved_tensors)
        with torch.enable_grad():
            out = dense_logits(q, k, *ctx.options).softmax(-1) @ v.double().movedim(1, -2)
            out = out.movedim(-2, 1).to(q.dtype)
        return (*torch.autograd.grad(out, (q, k, v), gradient), None, None)


class _Band:
    """`rule(i, j, T, S)`: whether row i sees key j."""

    def rule(self, i: int, j: int, t: int, s: int) -> bool:
        raise NotImplementedError

    def dense(self, t: int, s: int) -> Tensor:
        bias = torch.zeros(t, s, dtype=torch.float64)
        for i in range(t):
            for j in range(s):
                if not self.rule(i, j, t, s):
                    bias[i, j] = -math.inf
        return bias


class LowerTriangularMask(_Band):
    def rule(self, i: int, j: int, t: int, s: int) -> bool:
        return j <= i


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    def __init__(self, bias: Tensor) -> None:
        self._bias = bias

    def dense(self, t: int, s: int) -> Tensor:
        return super().dense(t, s) + self._bias.double()


class LowerTriangularFromBottomRightMask(_Band):
    def rule(self, i: int, j: int, t: int, s: int) -> bool:
        return j <= i + s - t


@dataclass
class LocalAttentionFromBottomRightMask(_Band):
    window_left: int
    window_right: int

    def rule(self, i: int, j: int, t: int, s: int) -> bool:
        return i + s - t - self.window_left <= j <= i + s - t + self.window_right


@dataclass
class _Info:
    seqstart_py: list[int]

    def intervals(self) -> Iterator[tuple[int, int]]:
        yield from pairwise(self.seqstart_py)


@dataclass
class BlockDiagonalMask(_Band):
    q_seqinfo: _Info
    k_seqinfo: _Info

    def block(self, i: int, j: int, t: int, s: int) -> bool:
        return True

    def rule(self, i: int, j: int, t: int, s: int) -> bool:
        for (a, b), (c, d) in zip(self.q_seqinfo.intervals(), self.k_seqinfo.intervals(), strict=True):
            if a <= i < b and c <= j < d:
                return self.block(i - a, j - c, b - a, d - c)
        return False


class BlockDiagonalCausalMask(BlockDiagonalMask):
    def block(self, i: int, j: int, t: int, s: int) -> bool:
        return j <= i


class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    def block(self, i: int, j: int, t: int, s: int) -> bool:
        return j <= i + s - t


@dataclass
class BlockDiagonalCausalLocalAttentionMask(BlockDiagonalMask):
    _window_size: int = 3

    def block(self, i: int, j: int, t: int, s: int) -> bool:
        return i - self._window_size < j <= i


class AnotherBias(_Band):
    """A kind that nobody knows; like all of xformers' own it can be made dense."""

    def rule(self, i: int, j: int, t: int, s: int) -> bool:
        return (i + j) % 3 != 0

    def materialize(self, shape: Any, dtype: Any = torch.float32, device: Any = "cpu") -> Tensor:
        return self.dense(*shape[-2:]).to(dtype).expand(shape)


class PagedBlockDiagonalPaddedKeysMask(BlockDiagonalMask):
    block_tables = torch.zeros(1)


@contextmanager
def installed(function: Callable[..., Any] = memory_efficient_attention) -> Iterator[None]:
    """`xformers.ops` importable."""
    package, ops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    package.ops = ops
    ops.memory_efficient_attention = function
    modules = {"xformers": package, "xformers.ops": ops}
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
