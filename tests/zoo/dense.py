"""What an attention layer does, written out densely in float64: what every figure is held against."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Dense:
    """One attention call.

    logits: `[B, H, T, S]`, -inf where a key is hidden.
    w_q, w_k: `[H, in, d]` of each query head; None: the spectral norms must be null.
    q, k: `[B, H, T, d]`, `[B, H, S, d]` as they enter the product; None: floor_activation must be null.
    scale: factor of q·k, a number or `[H]`.
    bias: what is added to scale · q·k, broadcastable to the logits.
    x_q, x_kv, b_q: inputs and query bias `[H, d]` of plain projections; None: floor_weights must be null.
    """

    layer: str
    logits: Tensor
    w_q: Tensor | None = None
    w_k: Tensor | None = None
    q: Tensor | None = None
    k: Tensor | None = None
    scale: float | Tensor = 1.0
    bias: Tensor | None = None
    x_q: Tensor | None = None
    x_kv: Tensor | None = None
    b_q: Tensor | None = None
    call: int = 0


@dataclass
class Entry:
    """A model, its inputs, and what its attention is."""

    name: str
    build: Callable[[], tuple[Any, ...]]
    dense: Callable[..., list[Dense]]
    train: bool = False


ZOO: dict[str, Entry] = {}


def add(
    name: str, build: Callable[[], tuple[Any, ...]], dense: Callable[..., list[Dense]], train: bool = False
) -> None:
    """Enter a model: `build` makes it and its inputs, `dense` says what its attention is."""
    ZOO[name] = Entry(name, build, dense, train)


def double(x: Tensor) -> Tensor:
    return x.detach().double()


def heads_of(weight: Tensor, heads: int) -> Tensor:
    """`[H·d, in]` to `[H, in, d]`."""
    return double(weight).reshape(heads, -1, weight.shape[1]).transpose(1, 2)


def project(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """`[B, T, in]` by `[H, in, d]` to `[B, H, T, d]`."""
    y = torch.einsum("bti,hid->bhtd", double(x), w)
    return y if b is None else y + double(b).reshape(w.shape[0], 1, w.shape[2])


def products(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("bhtd,bhsd->bhts", q, k)


def causal(t: int, s: int | None = None) -> Tensor:
    return torch.ones(t, s or t, dtype=torch.bool).tril()


def plain(
    layer: str,
    x: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    *,
    b_q: Tensor | None = None,
    b_k: Tensor | None = None,
    x_kv: Tensor | None = None,
    scale: float | None = None,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
    call: int = 0,
) -> Dense:
    """Dot-product attention with nothing between the projections (`[H, in, d]`) and the product."""
    x_kv = x if x_kv is None else x_kv
    q, k = project(x, w_q, b_q), project(x_kv, w_k, b_k)
    scale = w_q.shape[2] ** -0.5 if scale is None else scale
    logits = scale * products(q, k)
    if bias is not None:
        logits = logits + bias
    if visible is not None:
        logits = logits.masked_fill(~visible, -math.inf)
    b_heads = torch.zeros(w_q.shape[0], w_q.shape[2]) if b_q is None else b_q.reshape(w_q.shape[0], -1)
    return Dense(layer, logits, w_q, w_k, q, k, scale, bias, double(x), double(x_kv), double(b_heads), call)


def entropy_floor(norm: Tensor, n: Tensor) -> Tensor:
    """B(σ, n) of Theorem 3.1, from its minimising logits."""
    n = n.double()
    high = norm * (1 - 1 / n).clamp(min=0).sqrt()
    low = -norm / (n * (n - 1).clamp(min=1)).sqrt()
    rest = (n - 1) * (low - high).exp()
    value = (1 + rest).log() - rest * (low - high) / (1 + rest)
    return torch.where(n > 1, value, 0.0)


def _centred_norm(x: Tensor, visible: Tensor) -> Tensor:
    x = torch.where(visible, x, 0.0)
    mean = x.sum(-1, keepdim=True) / visible.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(visible, x - mean, 0.0).norm(dim=-1)


def figures(dense: Dense) -> dict[str, Tensor | None]:
    """Every column of the table, `[H]` each; None where it must be null."""
    u = double(dense.logits)
    visible = u > -math.inf
    n = visible.sum(-1)
    valid = n > 0
    p = u.masked_fill(~valid[..., None], 0.0).softmax(-1)
    entropy = torch.special.entr(p).sum(-1)
    heads = u.shape[1]

    def mean(rows: Tensor) -> Tensor:
        return torch.where(valid, rows, 0.0).sum((0, 2)) / valid.sum((0, 2))

    out: dict[str, Tensor | None] = dict.fromkeys(
        ("sigma_q", "sigma_k", "sigma_qk", "floor_paper", "floor_activation", "floor_weights")
    )
    out |= {
        "rows_read": valid.sum((0, 2)).double(),
        "entropy": mean(entropy),
        "max_entropy": mean(n.clamp(min=1).double().log()),
        "max_logit": u.amax((0, 2, 3)),
        "floor_row": mean(entropy_floor(_centred_norm(u, visible), n)),
    }
    sigma = None
    if dense.w_q is not None:
        out["sigma_q"] = torch.linalg.matrix_norm(dense.w_q, 2).expand(heads)
    if dense.w_k is not None:
        out["sigma_k"] = torch.linalg.matrix_norm(dense.w_k, 2).expand(heads)
    if dense.w_q is not None and dense.w_k is not None:
        sigma = torch.linalg.matrix_norm(dense.w_k @ dense.w_q.transpose(1, 2), 2).expand(heads)
        out["sigma_qk"] = sigma
        out["floor_paper"] = mean(entropy_floor(sigma[None, :, None].expand(n.shape), n))
    scale = torch.as_tensor(dense.scale, dtype=torch.float64).abs().reshape(1, -1, 1)
    bias = torch.zeros_like(u[..., :1, :1]) if dense.bias is None else double(dense.bias)
    bias = _centred_norm(bias.expand(u.shape), visible)
    if dense.q is not None and dense.k is not None:
        k_norm = torch.linalg.matrix_norm(dense.k, 2)[..., None]
        out["floor_activation"] = mean(entropy_floor(scale * k_norm * dense.q.norm(dim=-1) + bias, n))
    if dense.x_q is not None and dense.x_kv is not None and sigma is not None:
        x_kv = torch.linalg.matrix_norm(dense.x_kv, 2)[:, None, None]
        assert dense.w_k is not None
        assert dense.b_q is not None
        shift = (dense.w_k @ dense.b_q[..., None]).squeeze(-1).norm(dim=-1)[None, :, None]
        inner = sigma[None, :, None] * dense.x_q.norm(dim=-1)[:, None] + shift
        out["floor_weights"] = mean(entropy_floor(scale * x_kv * inner + bias, n))
    return out
