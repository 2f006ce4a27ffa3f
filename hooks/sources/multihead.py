"""Source: `F.multi_head_attention_forward`, which `nn.MultiheadAttention` and the encoder layers end in.

Its inside is invisible with `need_weights=True`, and what it returns then is averaged over heads and taken
after dropout; so q and k are recomputed from its arguments. They are those that it computes itself.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from entropy_monitor.hooks.calls import Inputs, Role, Seen
from entropy_monitor.hooks.projections import Layout, Projection, Rows, parameters_of
from entropy_monitor.hooks.site import Site
from entropy_monitor.measures import hidden

NAME = "multi_head_attention_forward"
GIVES_WEIGHTS = False
FUNCTIONS = (F.multi_head_attention_forward,)

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


def read(args: tuple[Any, ...], kwargs: dict[str, Any], site: Site) -> Seen:  # noqa: ARG001  it names all itself
    """What a call attends with, its inputs being `[T, B, E]` or unbatched `[T, E]`; see `sources.Source`."""
    bound = _SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    a = bound.arguments
    heads: int = a["num_heads"]
    x_q, x_k, x_v = (_batched(a[name]) for name in ("query", "key", "value"))
    projections = _projections(a, x_q, x_k, x_v, heads)
    q = _project(projections["query"], x_q)
    k = a["static_k"]
    if k is None:
        k = _append_bias(_project_flat(projections["key"], x_k), a["bias_k"])
        k = _split_heads(k, heads)
    else:
        k = torch.unflatten(k, 0, (-1, heads))
    if a["add_zero_attn"]:
        k = torch.cat([k, k.new_zeros(*k.shape[:2], 1, k.shape[3])], dim=2)
    extra = k.shape[2] != x_k.shape[0] or a["static_k"] is not None
    mask = _mask(a["attn_mask"], a["key_padding_mask"], q.shape[0], heads, x_k.shape[0], k.shape[2])
    return Seen(
        NAME,
        Inputs(q, k, mask, False, q.shape[-1] ** -0.5),
        projections=projections,
        extra_keys=extra,
    )


def _batched(x: Tensor) -> Tensor:
    return x if x.dim() == 3 else x[:, None]


def _projections(
    a: dict[str, Any], x_q: Tensor, x_k: Tensor, x_v: Tensor, heads: int
) -> dict[Role, Projection]:
    width = int(a["embed_dim_to_check"])
    d = width // heads
    fused = not a["use_separate_proj_weight"]
    found: dict[Role, Projection] = {}
    roles: tuple[tuple[Role, Tensor, Tensor | None], ...] = (
        ("query", x_q, a["q_proj_weight"]),
        ("key", x_k, a["k_proj_weight"]),
        ("value", x_v, a["v_proj_weight"]),
    )
    bias = a["in_proj_bias"]
    for i, (role, x, separate) in enumerate(roles):
        weight = a["in_proj_weight"] if fused else separate
        if weight is None:
            raise ValueError(f"nn.MultiheadAttention was called without a {role} weight")
        own_bias = bias if fused or bias is None else bias[i * width : (i + 1) * width]
        found[role] = Projection(
            weight,
            own_bias,
            Layout(heads, d, i * width if fused else 0, d),
            x,
            Rows(x.shape[1], x.shape[0], 0, 1, x.shape[1]),
            parameters=parameters_of(weight),
        )
    out = a["out_proj_weight"]
    found["output"] = Projection(
        out, None, Layout(1, out.shape[0], 0, out.shape[0]), None, None, parameters=parameters_of(out)
    )
    return found


def _project_flat(projection: Projection, x: Tensor) -> Tensor:
    """`[T, B, E]` through one projection, in the dtype (autocast included) that training computes it in."""
    layout = projection.layout
    part = slice(layout.base, layout.base + layout.heads * layout.head_size)
    bias = projection.bias if projection.bias is None else projection.bias[part]
    return F.linear(x, projection.weight[part], bias)


def _project(projection: Projection, x: Tensor) -> Tensor:
    return _split_heads(_project_flat(projection, x), projection.layout.heads)


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """`[T, B, H·D]` to `[B, H, T, D]`."""
    return torch.unflatten(x, -1, (heads, -1)).permute(1, 2, 0, 3)


def _append_bias(k: Tensor, bias_k: Tensor | None) -> Tensor:
    if bias_k is None:
        return k
    return torch.cat([k, bias_k.to(k.dtype).expand(1, k.shape[1], -1)])


def _mask(
    attn_mask: Tensor | None,
    padding: Tensor | None,
    batch: int,
    heads: int,
    keys: int,
    all_keys: int,
) -> Tensor | None:
    """Both masks as one in SDPA's form: boolean (True = seen), or additive where one of them is.

    nn.MultiheadAttention's booleans are the other way round: True means blocked.
    """
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = torch.unflatten(attn_mask, 0, (-1, heads))
    if padding is not None:
        padding = padding.view(-1, 1, 1, keys).expand(batch, 1, 1, keys)
    parts = [m for m in (attn_mask, padding) if m is not None]
    if not parts:
        return None
    if all(m.dtype == torch.bool for m in parts):
        blocked = parts[0] if len(parts) == 1 else parts[0] | parts[1]
        return _pad(~blocked, all_keys - keys, True)
    total = sum((_additive(m) for m in parts[1:]), start=_additive(parts[0]))
    return _pad(total, all_keys - keys, 0.0)


def _additive(mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        # What hides is told by the mask's own dtype and values: it is lost in a sum, or in float32.
        return mask.float().masked_fill(hidden(mask), float("-inf"))
    return torch.zeros(mask.shape, device=mask.device).masked_fill(mask, float("-inf"))


def _pad(mask: Tensor, extra: int, value: float) -> Tensor:
    """Appended keys (`bias_k`, zeros) are seen by every row."""
    return F.pad(mask, (0, extra), value=value) if extra else mask
