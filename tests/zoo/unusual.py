"""Projections in unusual places: a module per head, raw weights, adapters, shared maps, five dimensions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from tests.zoo.dense import Dense, add, causal, double, heads_of, plain, products
from tests.zoo.handmade import HD, D, H, tokens


class Head(nn.Module):
    """One head, one module."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(D, HD, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        k, q = self.key(x), self.query(x)
        wei = (q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5).masked_fill(~causal(x.shape[1]), float("-inf"))
        return F.softmax(wei, dim=-1) @ self.value(x)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.proj = nn.ModuleList(Head() for _ in range(H)), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.cat([h(x) for h in self.heads], dim=-1))


def heads_dense(m: Heads, x: Tensor) -> list[Dense]:
    return [
        plain(
            f"heads.{i}",
            x,
            heads_of(h.query.weight, 1),
            heads_of(h.key.weight, 1),
            visible=causal(x.shape[1]),
        )
        for i, h in enumerate(m.heads)
    ]


add("head-modules", lambda: (Heads(), tokens()), heads_dense)
add("head-modules-batch1", lambda: (Heads(), tokens(b=1)), heads_dense)
add("head-modules-one-token", lambda: (Heads(), tokens(t=1)), heads_dense)


class Weights(nn.Module):
    """Projections that are no nn.Linear, or more than one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.wq, self.wk, self.wv = (nn.Parameter(torch.randn(D, D) / D**0.5) for _ in range(3))
        self.hq, self.hk, self.hv = (nn.Parameter(torch.randn(H, D, HD) / D**0.5) for _ in range(3))
        self.a, self.b = nn.Linear(D, 2, bias=False), nn.Linear(2, D, bias=False)
        self.q = nn.Linear(D, D)
        if kind == "parametrized":
            parametrize.register_parametrization(self.q, "weight", Doubled())
        self.conv = nn.Conv2d(D, 3 * D, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (H, HD)).transpose(1, 2)

        if self.kind == "per_head":
            q, k, v = (torch.einsum("btd,hde->bhte", x, w) for w in (self.hq, self.hk, self.hv))
        elif self.kind == "per_head_matmul":
            q, k, v = (x.unsqueeze(1) @ w for w in (self.hq, self.hk, self.hv))
        elif self.kind == "conv":
            img = self.conv(x.transpose(1, 2).unsqueeze(-1))
            q, k, v = img.view(x.shape[0], 3, H, HD, -1).transpose(-1, -2).unbind(1)
        else:
            q, k, v = F.linear(x, self.wq), x @ self.wk, x.matmul(self.wv)
            if self.kind == "adapter":
                q = q + self.b(self.a(x))
            elif self.kind == "parametrized":
                q = self.q(x)
            q, k, v = split(q), split(k), split(v)
        return F.scaled_dot_product_attention(q, k, v)


class Doubled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


def weights_dense(m: Weights, x: Tensor) -> list[Dense]:
    if m.kind.startswith("per_head"):
        d = plain("Weights", x, double(m.hq), double(m.hk))
        d.x_q = None
        return [d]
    if m.kind == "conv":
        w = m.conv.weight.flatten(1).split(D)
        d = plain("Weights", x, heads_of(w[0], H), heads_of(w[1], H))
        d.x_q = None
        return [d]
    wk = heads_of(m.wk.T, H)
    if m.kind == "adapter":
        both = double(m.wq) + double(m.b.weight) @ double(m.a.weight)
        return [plain("Weights", x, heads_of(both, H), wk)]
    if m.kind == "parametrized":
        original = m.q.parametrizations.weight.original
        return [plain("Weights", x, heads_of(2 * original, H), wk, b_q=m.q.bias)]
    return [plain("Weights", x, heads_of(m.wq, H), wk)]


for kind in ("raw", "adapter", "parametrized", "per_head", "per_head_matmul", "conv"):
    add(f"weights-{kind}", lambda kind=kind: (Weights(kind), tokens()), weights_dense)


class SharedHead(nn.Module):
    """One small linear map for every head: heads are split before the projection."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = H
        self.values, self.keys, self.queries = (nn.Linear(HD, HD, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = x.reshape(x.shape[0], -1, H, HD)
        energy = torch.einsum("nqhd,nkhd->nhqk", [self.queries(y), self.keys(y)])
        att = torch.softmax(energy / (D ** (1 / 2)), dim=3)
        return torch.einsum("nhql,nlhd->nqhd", [att, self.values(y)])


def shared_dense(m: SharedHead, x: Tensor) -> list[Dense]:
    y = double(x).unflatten(-1, (H, HD)).transpose(1, 2)
    wq, wk = double(m.queries.weight).T, double(m.keys.weight).T
    q, k = y @ wq, y @ wk
    return [
        Dense(
            "SharedHead",
            products(q, k) / D**0.5,
            wq.expand(H, HD, HD),
            wk.expand(H, HD, HD),
            q,
            k,
            D**-0.5,
        )
    ]


add("shared-head", lambda: (SharedHead(), tokens()), shared_dense)


class Scores(nn.Module):
    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.transpose(-1, -2)


class Submodules(nn.Module):
    """The product, and the softmax, in modules of their own; two different calls in one owner."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = H
        self.qkv, self.scores, self.soft = nn.Linear(D, 3 * D), Scores(), nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, H, HD)).permute(2, 0, 3, 1, 4)
        first = self.soft(self.scores(q, k)) @ v
        return first + self.soft(self.scores(k, q) * 0.1) @ v


def submodules_dense(m: Submodules, x: Tensor) -> list[Dense]:
    wq, wk, _ = (heads_of(w, H) for w in m.qkv.weight.split(D))
    bq, bk, _ = m.qkv.bias.split(D)
    return [
        plain("Submodules", x, wq, wk, b_q=bq, b_k=bk, scale=1.0),
        plain("Submodules", x, wk, wq, b_q=bk, b_k=bq, scale=0.1, call=1),
    ]


add("submodules-two-calls", lambda: (Submodules(), tokens()), submodules_dense)


class Grouped(nn.Module):
    """Five-dimensional logits: query heads in groups that share a key head."""

    def __init__(self, groups_first: bool) -> None:
        super().__init__()
        self.q, self.kv, self.groups_first = nn.Linear(D, D), nn.Linear(D, 2 * HD * 2), groups_first

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv(x).unflatten(-1, (2, 2, HD)).permute(2, 0, 3, 1, 4)  # two key heads
        q = self.q(x).unflatten(-1, (2, 2, HD))  # [B, T, K, G, d]
        if self.groups_first:
            s = torch.einsum("bghnd,bhsd->bghns", q.permute(0, 3, 2, 1, 4) * HD**-0.5, k)
            return torch.einsum("bghns,bhsd->bnhgd", s.softmax(-1), v)
        s = q.permute(0, 2, 3, 1, 4) @ k.unsqueeze(2).mT
        return s.mul(HD**-0.5).softmax(-1) @ v.unsqueeze(2)


def grouped_dense(m: Grouped, x: Tensor) -> list[Dense]:
    wk = heads_of(m.kv.weight[: 2 * HD], 2).repeat_interleave(2, dim=0)
    bk = m.kv.bias[: 2 * HD].view(2, HD).repeat_interleave(2, dim=0).flatten()
    return [plain("Grouped", x, heads_of(m.q.weight, H), wk, b_q=m.q.bias, b_k=bk)]


for groups_first in (False, True):
    add(
        f"grouped-5d-{'gk' if groups_first else 'kg'}",
        lambda g=groups_first: (Grouped(g), tokens()),
        grouped_dense,
    )
