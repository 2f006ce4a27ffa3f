"""Attention in the many other ways that people write it."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention as early_sdpa
from torch.nn.functional import softmax as early_softmax
from torch.utils.checkpoint import checkpoint

from tests.zoo.dense import Dense, add, causal, double, heads_of, plain

D, H, T, B = 32, 4, 11, 3
HD = D // H


def tokens(b: int = B, t: int = T, d: int = D) -> Tensor:
    return torch.randn(b, t, d) * 2


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: nn.Module) -> Tensor:
    d_k = query.size(-1)
    scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(d_k)
    if mask is not None:
        scores = scores.masked_fill(mask == 0, -1e9)
    return torch.matmul(dropout(early_softmax(scores, dim=-1)), value)


class Annotated(nn.Module):
    """The annotated transformer: cloned linears, a helper function outside, self.h."""

    def __init__(self) -> None:
        super().__init__()
        self.d_k, self.h = HD, H
        self.linears = nn.ModuleList([copy.deepcopy(nn.Linear(D, D)) for _ in range(4)])
        self.dropout = nn.Dropout(0.1)

    def forward(self, query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
        n = query.size(0)
        q, k, v = (
            lin(x).view(n, -1, self.h, self.d_k).transpose(1, 2)
            for lin, x in zip(self.linears, (query, key, key), strict=False)
        )
        x = attention(q, k, v, mask.unsqueeze(1), self.dropout)
        return self.linears[-1](x.transpose(1, 2).contiguous().view(n, -1, D))


def annotated_dense(m: Annotated, q: Tensor, kv: Tensor, mask: Tensor) -> list[Dense]:
    a, b = m.linears[0], m.linears[1]
    return [
        plain(
            "Annotated",
            q,
            heads_of(a.weight, H),
            heads_of(b.weight, H),
            b_q=a.bias,
            b_k=b.bias,
            x_kv=kv,
            visible=mask[:, None].bool(),
        )
    ]


def _annotated() -> tuple[object, ...]:
    mask = (torch.rand(B, 7, T) > 0.3).long()
    mask[0, 2] = 0  # a row that sees nothing
    return Annotated(), tokens(t=7), tokens(), mask


for train in (False, True):
    add(f"annotated-{'train' if train else 'eval'}", _annotated, annotated_dense, train=train)


class Hand(nn.Module):
    """Separate q, k, v linears; `kind` says how the rest is spelled."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, D) for _ in range(3))
        self.kind, self.soft = kind, nn.Softmax(dim=-1)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], H, HD).transpose(-2, -3)

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, "run_" + self.kind)(x, *(f(x) for f in (self.q, self.k, self.v)))

    def run_fairseq(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = x.transpose(0, 1)  # [T, B, E]
        t, b, _ = x.shape
        q = self.q(x) * HD**-0.5
        k, v = self.k(x), self.v(x)
        q, k, v = (y.contiguous().view(t, b * H, HD).transpose(0, 1) for y in (q, k, v))
        w = torch.bmm(q, k.transpose(1, 2)).view(b, H, t, t)
        w = w.masked_fill(~causal(t), float("-inf")).view(b * H, t, t)
        return torch.bmm(F.softmax(w, dim=-1), v)

    def run_heads_outside(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (y.view(b, t, H, HD).permute(2, 0, 1, 3).contiguous().view(-1, t, HD) for y in (q, k, v))
        return self.soft(torch.bmm(q, k.transpose(1, 2)) / HD**0.5) @ v

    def run_split_cat(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (torch.cat(y.split(HD, dim=2), dim=0) for y in (q, k, v))
        return torch.softmax(torch.bmm(q, k.transpose(1, 2)) * HD**-0.5, dim=2) @ v

    def run_einsum_bhid(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (self.split(y) for y in (q, k, v))
        return (torch.einsum("b h i d, b h j d -> b h i j", q, k) * HD**-0.5).softmax(dim=-1) @ v

    def run_einsum_bthd(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (H, HD)) for y in (q, k, v))
        a = F.softmax(torch.einsum("bthd,bshd->bhts", q, k).div_(HD**0.5), -1)
        return torch.einsum("bhts,bshd->bthd", a, v)

    def run_einsum_heads_last(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (H, HD)) for y in (q, k, v))
        a = F.softmax(torch.einsum("bihd,bjhd->bijh", q, k) / HD**0.5, dim=2)
        return torch.einsum("bijh,bjhd->bihd", a, v)

    def run_einsum_dots(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (self.split(y) for y in (q, k, v))
        return torch.einsum("...id,...jd->...ij", q * HD**-0.25, k * HD**-0.25).softmax(-1) @ v

    def run_keys_first(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (self.split(y) for y in (q, k, v))
        scores = (k @ q.transpose(-1, -2)) * HD**-0.5  # [B, H, keys, queries]
        return scores.softmax(dim=-2).transpose(-1, -2) @ v

    def run_transposed(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (self.split(y) for y in (q, k, v))
        scores = (k @ q.mT).transpose(-1, -2) * HD**-0.5
        return scores.softmax(dim=-1) @ v

    def run_d_k_h(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (HD, H)).permute(0, 3, 1, 2) for y in (q, k, v))  # 'b t (d h)'
        return early_sdpa(q, k, v)

    def run_inplace(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q *= HD**-0.5
        q, k, v = (self.split(y) for y in (q, k, v))
        return (q @ k.mT).softmax(-1) @ v

    def run_sdpa3d(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (self.split(y).flatten(0, 1) for y in (q, k, v))
        return early_sdpa(q, k, v)

    def run_per_head(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = [
            F.softmax(a @ b.transpose(1, 2) * HD**-0.5, -1) @ c
            for a, b, c in zip(q.split(HD, -1), k.split(HD, -1), v.split(HD, -1), strict=True)
        ]
        return torch.cat(out, -1)

    def run_folded_copies(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (self.split(y).reshape(-1, x.shape[1], HD) for y in (q, k, v))
        return torch.einsum("b i d, b j d -> b i j", q, k).mul(HD**-0.5).softmax(-1) @ v

    def run_kwargs(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (self.split(y) for y in (q, k, v))
        return torch.matmul(torch.softmax(input=torch.matmul(q, other=k.mT) / 8**0.5, dim=-1), v)

    def run_checkpointed(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (self.split(y) for y in (q, k, v))
        return checkpoint(early_sdpa, q, k, v, use_reentrant=False)


def hand_dense(m: Hand, x: Tensor) -> list[Dense]:
    wq, wk = heads_of(m.q.weight, H), heads_of(m.k.weight, H)
    bq, bk = m.q.bias, m.k.bias
    if m.kind == "d_k_h":
        wq, wk = (double(w).view(HD, H, D).permute(1, 2, 0) for w in (m.q.weight, m.k.weight))
        bq, bk = (b.view(HD, H).T.flatten() for b in (bq, bk))
    d = plain("Hand", x, wq, wk, b_q=bq, b_k=bk, visible=causal(T) if m.kind == "fairseq" else None)
    if m.kind != "per_head":
        return [d]
    out = []
    for i in range(H):
        b = m.q.bias.view(H, HD)[i], m.k.bias.view(H, HD)[i]
        out.append(plain("Hand", x, wq[i : i + 1], wk[i : i + 1], b_q=b[0], b_k=b[1], call=i))
    return out


for kind in [n.removeprefix("run_") for n in vars(Hand) if n.startswith("run_")]:
    add(f"hand-{kind}", lambda kind=kind: (Hand(kind), tokens()), hand_dense)
