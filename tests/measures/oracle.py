"""The slow truth: float64, one row and one key at a time, written from the definitions."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Row(NamedTuple):
    entropy: float
    num_keys: int
    max_logit: float
    logit_norm: float
    bias_norm: float
    probabilities: list[float]


def is_hidden(value: float, dtype: torch.dtype, two_valued: bool) -> bool:
    return value <= -0.99e9 or value <= torch.finfo(dtype).min / 2 or (two_valued and value < -9000)


def one_row(logits: list[float], seen: list[bool], biases: list[float]) -> Row:
    u = [x for x, s in zip(logits, seen, strict=True) if s]
    b = [x for x, s in zip(biases, seen, strict=True) if s]
    if not u:
        return Row(0.0, 0, -math.inf, 0.0, 0.0, [0.0] * len(logits))
    top = max(u)
    total = math.fsum(math.exp(x - top) for x in u)
    p = [math.exp(x - top) / total if s else 0.0 for x, s in zip(logits, seen, strict=True)]
    # log p from the logits: 1 - p of a sharp row has lost its digits even in float64.
    rest = math.fsum(sorted(math.exp(x - top) for x in u)[:-1])
    entropy = math.fsum(q * (math.log1p(rest) - (x - top)) for q, x in zip(p, logits, strict=True) if q > 0)
    return Row(entropy, len(u), top, _centred_norm(u), _centred_norm(b), p)


def _centred_norm(values: list[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values))


def all_rows(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
) -> dict[str, Tensor]:
    """Every field of Row as a float64 tensor `[B, H, Tq]` (probabilities `[B, H, Tq, Tk]`)."""
    B, H, Tq, D = q.shape
    Hk, Tk = k.shape[1:3]
    scale = 1 / math.sqrt(D) if scale is None else scale
    two_valued = False
    if mask is not None:
        two_valued = mask.dtype != torch.bool and all(
            v == 0 or abs(v + 1e4) < 40 for v in mask.flatten().tolist()
        )
        full = mask.expand(B, H, Tq, Tk)
    rows = []
    for b in range(B):
        for h in range(H):
            keys = k[b, h // (H // Hk)].double()
            for i in range(Tq):
                u = (keys @ q[b, h, i].double() * scale).tolist()
                if softcap is not None:
                    u = [softcap * math.tanh(x / softcap) for x in u]
                seen, bias = [True] * Tk, [0.0] * Tk
                if mask is not None:
                    values = full[b, h, i].tolist()
                    if mask.dtype == torch.bool:
                        seen = values
                    else:
                        seen = [not is_hidden(v, mask.dtype, two_valued) for v in values]
                        bias = values
                        u = [x + y for x, y in zip(u, bias, strict=True)]
                if is_causal:
                    seen = [s and j <= i for j, s in enumerate(seen)]
                rows.append(one_row(u, seen, bias))
    out = {}
    for name in Row._fields:
        values = torch.tensor([getattr(r, name) for r in rows], dtype=torch.float64)
        out[name] = values.reshape(B, H, Tq, *values.shape[1:])
    return out
