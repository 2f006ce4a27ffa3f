"""A package that speaks as flash-attn does and computes densely, for machines without its kernels.

Its public functions call an autograd function, as the real ones do, so that what they do inside
says no more than their arguments.
"""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from typing import Any

import torch
from torch import Tensor


def dense_logits(
    q: Tensor,
    k: Tensor,
    scale: float | None,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
    slopes: Tensor | None,
) -> Tensor:
    """`[H, T, S]` of one sequence, q `[T, H, D]` and k `[S, K, D]`, row by row and key by key; float64."""
    t, h, d = q.shape
    s = len(k)
    scale = 1 / math.sqrt(d) if scale is None else scale
    k = k.repeat_interleave(h // k.shape[1], dim=1)
    u = torch.einsum("thd,shd->hts", q.double(), k.double()) * scale
    if softcap > 0:
        u = softcap * (u / softcap).tanh()
    for i in range(t):
        for j in range(s):
            place = i + s - t
            if slopes is not None:
                u[:, i, j] -= slopes.double() * abs(place - j)
            low = window[0] >= 0 and j < place - window[0]
            high = j > place if causal else window[1] >= 0 and j > place + window[1]
            if low or high:
                u[:, i, j] = -math.inf
    return u


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.options = options
        return _run(q, k, v, *options)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = _run(*inputs, *ctx.options)
        return (*torch.autograd.grad(out, inputs, gradient), *(None for _ in ctx.options))


def _run(
    q: Tensor, k: Tensor, v: Tensor, scale: Any, causal: Any, window: Any, softcap: Any, slopes: Any
) -> Tensor:
    out = []
    for n in range(len(q)):
        own = slopes if slopes is None or slopes.dim() == 1 else slopes[n]
        u = dense_logits(q[n], k[n], scale, causal, window, softcap, own)
        p = u.softmax(-1).nan_to_num(0.0)
        values = v[n].double().repeat_interleave(q.shape[2] // v.shape[2], dim=1)
        out.append(torch.einsum("hts,shd->thd", p, values))
    return torch.stack(out).to(q.dtype)


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    return _Attend.apply(q, k, v, softmax_scale, causal, window_size, softcap, alibi_slopes)


def flash_attn_qkvpacked_func(
    qkv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    return _Attend.apply(*qkv.unbind(2), softmax_scale, causal, window_size, softcap, alibi_slopes)


def flash_attn_kvpacked_func(
    q,
    kv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    return _Attend.apply(q, *kv.unbind(2), softmax_scale, causal, window_size, softcap, alibi_slopes)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    out = []
    a, b = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(a) - 1):
        own = (x[None, s:e] for x, s, e in ((q, a[i], a[i + 1]), (k, b[i], b[i + 1]), (v, b[i], b[i + 1])))
        slopes = alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[i]
        out.append(_Attend.apply(*own, softmax_scale, causal, window_size, softcap, slopes)[0])
    return torch.cat(out)


def flash_attn_varlen_qkvpacked_func(
    qkv,
    cu_seqlens,
    max_seqlen,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    return flash_attn_varlen_func(
        *qkv.unbind(1),
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
    )


def flash_attn_varlen_kvpacked_func(
    q,
    kv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    return flash_attn_varlen_func(
        q,
        *kv.unbind(1),
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
    )


def flash_attn_with_kvcache(q, k_cache, v_cache, **options):
    raise NotImplementedError("the stand-in decodes nothing")


PUBLIC = (
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_kvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_with_kvcache,
)


@contextmanager
def installed() -> Iterator[types.ModuleType]:
    """`flash_attn` importable, with `bert_padding` as transformers asks of it."""
    from transformers import modeling_flash_attention_utils as utilities

    package, padding = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.bert_padding")
    package.__spec__ = ModuleSpec("flash_attn", None)
    for function in PUBLIC:
        setattr(package, function.__name__, function)
    padding.pad_input, padding.unpad_input = utilities._pad_input, utilities._unpad_input
    package.bert_padding = padding
    modules = {"flash_attn": package, "flash_attn.bert_padding": padding}
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield package
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
