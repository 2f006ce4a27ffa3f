"""Source: `F.scaled_dot_product_attention`, under whatever name it was bound."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from entropy_monitor.hooks.arrangement import Arrangement
from entropy_monitor.hooks.calls import Inputs, Seen
from entropy_monitor.hooks.site import Site

NAME = "scaled_dot_product_attention"
GIVES_WEIGHTS = False
FUNCTIONS = (
    F.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)


def read(args: tuple[Any, ...], kwargs: dict[str, Any], site: Site) -> Seen:
    """What a call attends with; see `sources.Source`."""
    return _read(site, *args, **kwargs)


def _read(
    site: Site,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,  # noqa: ARG001  fewer key heads show in the shapes
) -> Seen:
    del dropout_p  # entropies are taken before dropout
    origins = {"query": site.origin_of(query), "key": site.origin_of(key)}
    n = query.dim() - 2
    if n == 1:
        arrangement = site.arrange(query, origins["query"])
        k = arrangement.apply_to_keys(key, query)
    else:
        query, key = _together(query, key)
        if n > 2:  # windows among the leading dimensions, perhaps after the heads
            told = _side_whose_memory_tells(query, key, site)
            arrangement = site.arrange(query if told == "query" else key, origins[told])
        else:
            arrangement = Arrangement(tuple(range(n - 1)), (n - 1,) if n else ())
        k = arrangement.apply(key)
    q = arrangement.apply(query)
    mask = attn_mask
    if mask is not None and n != 2 and mask.dim() > 2:
        mask = arrangement.apply(mask.expand(*query.shape[:-2], *mask.shape[-2:]))
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    return Seen(
        NAME,
        Inputs(q.to(site.kernel_dtype(q)), k.to(site.kernel_dtype(k)), mask, is_causal, scale),
        value=value,
        tensors={"query": q, "key": k},
        origins=origins,
        output_size=query.shape[:-1].numel() * value.shape[-1],
    )


def _side_whose_memory_tells(query: Tensor, key: Tensor, site: Site) -> str:
    """Queries, unless they are copies (pooled, scaled) and the keys beside them are not."""
    told = site.root_of(query) is None and site.root_of(key) is not None
    return "key" if told and query.shape[:-2] == key.shape[:-2] else "query"


def _together(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Queries `[…, H, T, D]` and keys `[…, K, S, D]`, each broadcast over the sequences of the other."""
    lead = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3])  # type: ignore[no-untyped-call]
    return query.expand(*lead, *query.shape[-3:]), key.expand(*lead, *key.shape[-3:])
