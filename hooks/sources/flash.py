"""Source: flash-attn's public functions, of versions 2, 3 and 4 and of kernels that speak their language.

Causal masks and windows start at the lower right. Packed sequences are read as `[B, H, T, D]`, T being the
longest; rows behind a sequence's end see no key and are left out of everything.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from entropy_monitor.hooks.calls import Inputs, Seen
from entropy_monitor.hooks.site import Site
from entropy_monitor.hooks.sources.band import Band, unpacked
from entropy_monitor.hooks.unread import UnreadError

NAME = "flash_attn"
GIVES_WEIGHTS = False

_MODULES = (
    "flash_attn",
    "flash_attn.flash_attn_interface",
    "flash_attn.cute",
    "flash_attn.cute.interface",
    "flash_attn_interface",
)
_FUNCTIONS = (
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
)
_CHOSEN = (
    ("transformers.modeling_flash_attention_utils", "_flash_fn"),
    ("transformers.modeling_flash_attention_utils", "_flash_varlen_fn"),
)
_UNREAD = ("block_table", "page_table", "leftpad_k", "learnable_sink", "s_aux", "qv", "qv_", "cache_seqlens")
_SEQUENCES = ("cu_seqlens_q", "cu_seqlens")


def functions() -> Iterator[FunctionType]:
    """The functions that exist in this process, without importing anything."""
    places = [(module, name) for module in _MODULES for name in _FUNCTIONS]
    found: dict[int, FunctionType] = {}
    for module, name in (*places, *_CHOSEN):
        function = getattr(sys.modules.get(module), name, None)
        if function is not None:
            function = inspect.unwrap(function)
            if isinstance(function, FunctionType):
                found[id(function)] = function
    yield from found.values()


def read(function: FunctionType, args: tuple[Any, ...], kwargs: dict[str, Any], site: Site) -> Seen | None:
    """What a call attends with.

    Args:
        function: that is called; its signature names the arguments.
        args: of the call.
        kwargs: of the call.
        site: where it is called.

    Raises:
        UnreadError: where keys are paged or rows have a sink: these are not read.
    """
    a = _arguments(function, args, kwargs)
    for name in _UNREAD:
        if a.get(name) is not None:
            raise UnreadError(f"flash attention with {name} is not read")
    q, k, v = _operands(a)
    scale = a.get("softmax_scale")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    cap = float(a.get("softcap") or 0.0)
    inner = scale / cap if cap > 0 else None
    origins = {"query": site.origin_of(q), "key": site.origin_of(k)}
    packed = q.dim() == 3
    if packed:
        tensors = {"query": q.transpose(0, 1)[None], "key": k.transpose(0, 1)[None]}
        starts = next(a[name] for name in _SEQUENCES if a.get(name) is not None)
        starts_k = a.get("cu_seqlens_k")
        starts_k = starts if starts_k is None else starts_k
        longest = int(a["max_seqlen_q"] if "max_seqlen_q" in a else a["max_seqlen"])
        longest_k = a.get("max_seqlen_k")
        queries, rows = unpacked(q, starts, longest)
        keys, lengths = unpacked(k, starts_k, longest if longest_k is None else int(longest_k))
        if a.get("seqused_q") is not None:
            rows = a["seqused_q"].long()
        if a.get("seqused_k") is not None:
            lengths = a["seqused_k"].long()
        shift: int | Tensor = lengths - rows
    else:
        queries, keys = q.transpose(1, 2), k.transpose(1, 2)
        tensors = {"query": queries, "key": keys}
        rows, lengths, shift = None, None, keys.shape[2] - queries.shape[2]
    left, right = _window(a)
    band = Band(shift, left, right, rows, lengths, a.get("alibi_slopes"))
    return Seen(
        NAME,
        Inputs(queries, keys, scale=scale if inner is None else cap, inner=inner, modify=band),
        value=v,
        tensors=tensors,
        origins=origins,
        extra_keys=packed,  # inputs are not packed as queries are here: floors from them are not known
        output_size=q.shape[:-1].numel() * v.shape[-1],
    )


def _arguments(function: FunctionType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = inspect.signature(function, follow_wrapped=False).bind(*args, **kwargs)
    bound.apply_defaults()
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            named |= dict(zip(("q", "k", "v"), value, strict=False))
        else:
            named[name] = value
    return named


def _operands(a: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    if a.get("qkv") is not None:
        qkv: Tensor = a["qkv"]
        if qkv.shape[-3] == 3:  # [..., 3, H, D]
            return qkv.select(-3, 0), qkv.select(-3, 1), qkv.select(-3, 2)
        key_heads = (qkv.shape[-2] - int(a["num_heads_q"])) // 2  # [..., H + 2 K, D]
        q, k, v = torch.split(qkv, [int(a["num_heads_q"]), key_heads, key_heads], dim=-2)
        return q, k, v
    if a.get("kv") is not None:
        kv: Tensor = a["kv"]
        return a["q"], kv.select(-3, 0), kv.select(-3, 1)
    return a["q"], a["k"], a["v"]


def _window(a: dict[str, Any]) -> tuple[int | None, int | None]:
    """How many keys to the left and to the right of the diagonal are seen; None for all."""
    window = a.get("window_size") or (-1, -1)
    left, right = (None if n is None or int(n) < 0 else int(n) for n in window)
    if a.get("causal"):
        right = 0
    return left, right
