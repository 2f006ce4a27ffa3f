"""Decoders as people write them: nanoGPT, rotary, grouped queries, ALiBi, QK-norm, soft-caps, sinks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.dense import (
    Dense,
    add,
    causal,
    double,
    heads_of,
    plain,
    products,
    project,
)

D, H, T, B = 32, 4, 11, 3
HD = D // H


def tokens(b: int = B, t: int = T, d: int = D) -> Tensor:
    return torch.randn(b, t, d) * 2


class NanoAttention(nn.Module):
    """Fused c_attn, split, causal buffer."""

    def __init__(self, flash: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.c_attn = nn.Linear(D, 3 * D)
        self.c_proj = nn.Linear(D, D)
        self.n_head, self.flash, self.dropout = H, flash, dropout
        self.attn_dropout = nn.Dropout(dropout)
        self.register_buffer("bias", torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(D, dim=2)
        k = k.view(b, t, self.n_head, c // self.n_head).transpose(1, 2)
        q = q.view(b, t, self.n_head, c // self.n_head).transpose(1, 2)
        v = v.view(b, t, self.n_head, c // self.n_head).transpose(1, 2)
        if self.flash:
            p = self.dropout if self.training else 0
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=p, is_causal=True)
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
            y = self.attn_dropout(F.softmax(att, dim=-1)) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))


class NanoBlock(nn.Module):
    def __init__(self, flash: bool, dropout: float) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attn = NanoAttention(flash, dropout)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    def __init__(self, flash: bool, dropout: float = 0.0, tied: bool = False) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(50, D), nn.Embedding(64, D)
        blocks = [NanoBlock(flash, dropout) for _ in range(2)]
        self.h = nn.ModuleList([blocks[0], blocks[0]] if tied else blocks)
        self.head = nn.Linear(D, 50, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.h:
            x = block(x)
        return self.head(x).softmax(-1)  # a vocabulary's softmax is no attention


def nano_dense(model: NanoGPT, ids: Tensor) -> list[Dense]:
    """Written from the weights alone; dropout does not move the first layer's attention."""
    out = []
    x = double(model.wte.weight)[ids] + double(model.wpe.weight)[: ids.shape[1]]
    for i, block in enumerate(model.h):
        a, tied = block.attn, model.h[0] is model.h[1]
        w, bias = double(a.c_attn.weight), double(a.c_attn.bias)
        y = F.layer_norm(x, (D,), double(block.ln_1.weight), double(block.ln_1.bias))
        (wq, wk, wv), (bq, bk, bv) = (heads_of(p, H) for p in w.split(D)), bias.split(D)
        name = "h.0.attn" if tied else f"h.{i}.attn"
        dense = plain(name, y, wq, wk, b_q=bq, b_k=bk, visible=causal(ids.shape[1]), call=i if tied else 0)
        out.append(dense)
        z = torch.einsum("bhts,bhsd->bthd", dense.logits.softmax(-1), project(y, wv, bv)).flatten(2)
        x = x + z @ double(a.c_proj.weight).T + double(a.c_proj.bias)
        y = F.layer_norm(x, (D,), double(block.ln_2.weight), double(block.ln_2.bias))
        y = F.gelu(y @ double(block.mlp[0].weight).T + double(block.mlp[0].bias))
        x = x + y @ double(block.mlp[2].weight).T + double(block.mlp[2].bias)
    return out


for flash in (False, True):
    for tied in (False, True):
        add(
            f"nanogpt-{'sdpa' if flash else 'masked_fill'}{'-tied' if tied else ''}",
            lambda flash=flash, tied=tied: (NanoGPT(flash, 0.0, tied), torch.randint(50, (B, T))),
            nano_dense,
        )


def rotary(x: Tensor) -> Tensor:
    """Rotate-half over `[B, H, T, d]`."""
    t, d = x.shape[-2:]
    inv = 1.0 / (10000 ** (torch.arange(0, d, 2) / d))
    angle = torch.outer(torch.arange(t).float(), inv)
    emb = torch.cat([angle, angle], dim=-1).to(x.dtype)
    x1, x2 = x[..., : d // 2], x[..., d // 2 :]
    return x * emb.cos() + torch.cat((-x2, x1), dim=-1) * emb.sin()


def rotary_complex(x: Tensor) -> Tensor:
    """Interleaved pairs over `[B, T, H, d]`, as complex numbers."""
    t, d = x.shape[1], x.shape[-1]
    inv = 1.0 / (10000 ** (torch.arange(0, d, 2) / d))
    turn = torch.polar(torch.ones(t, d // 2), torch.outer(torch.arange(t).float(), inv))[None, :, None]
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn).flatten(3).type_as(x)


def rms(x: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


class Llama(nn.Module):
    """Separate projections, grouped queries, rotary, optional QK-norm; keys shared in one of three ways."""

    def __init__(self, kv: int, how: str = "repeat", rope: str = "half", norm: bool = False) -> None:
        super().__init__()
        self.wq, self.wk = nn.Linear(D, D, bias=False), nn.Linear(D, kv * HD, bias=False)
        self.wv, self.wo = nn.Linear(D, kv * HD, bias=False), nn.Linear(D, D, bias=False)
        self.kv, self.how, self.rope = kv, how, rope
        self.q_norm = nn.RMSNorm(HD) if norm else nn.Identity()
        self.k_norm = nn.RMSNorm(HD) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q_norm(self.wq(x).view(b, t, H, HD))
        k = self.k_norm(self.wk(x).view(b, t, self.kv, HD))
        v = self.wv(x).view(b, t, self.kv, HD).transpose(1, 2)
        if self.rope == "complex":
            q, k = rotary_complex(q), rotary_complex(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        if self.rope == "half":
            q, k = rotary(q), rotary(k)
        n = H // self.kv
        if self.how == "repeat":
            k, v = k.repeat_interleave(n, dim=1), v.repeat_interleave(n, dim=1)
        elif self.how == "expand":
            k, v = (y[:, :, None].expand(b, self.kv, n, t, HD).reshape(b, H, t, HD) for y in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.how == "gqa")
        return self.wo(y.transpose(1, 2).reshape(b, t, D))


def llama_dense(m: Llama, x: Tensor) -> list[Dense]:
    wq = heads_of(m.wq.weight, H)
    wk = heads_of(m.wk.weight, m.kv).repeat_interleave(H // m.kv, dim=0)
    if m.rope == "none" and isinstance(m.q_norm, nn.Identity):
        return [plain("Llama", x, wq, wk, visible=causal(x.shape[1]))]
    q, k = project(x, wq), project(x, wk)
    if isinstance(m.q_norm, nn.RMSNorm):
        q, k = (
            y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps) for y in (q, k)
        )
    if m.rope == "half":
        q, k = rotary(q), rotary(k)
    elif m.rope == "complex":
        q, k = (rotary_complex(y.transpose(1, 2)).transpose(1, 2) for y in (q, k))
    logits = (HD**-0.5 * products(q, k)).masked_fill(~causal(x.shape[1]), -math.inf)
    return [Dense("Llama", logits, wq, wk, q, k, HD**-0.5)]


for kv, how, rope, norm in (
    (2, "repeat", "half", False),
    (2, "expand", "complex", False),
    (2, "gqa", "half", True),
    (1, "gqa", "none", False),
    (1, "repeat", "none", False),
    (2, "expand", "none", False),
    (4, "none", "half", True),
    (4, "none", "none", True),
):
    add(
        f"llama-kv{kv}-{how}-{rope}{'-qknorm' if norm else ''}",
        lambda kv=kv, how=how, rope=rope, norm=norm: (Llama(kv, how, rope, norm), tokens()),
        llama_dense,
    )


class Biased(nn.Module):
    """Attention with something added to, or done with, its logits."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, D) for _ in range(3))
        self.kind = kind
        self.table = nn.Parameter(torch.randn(H, 2 * 64) * 2)
        self.sink = nn.Parameter(torch.randn(H))
        self.tau = nn.Parameter(torch.rand(H, 1, 1) + 5)
        self.mix = nn.Parameter(torch.randn(H, H))

    def bias(self, t: int) -> Tensor:
        i = torch.arange(t)
        if self.kind == "alibi":
            slopes = torch.tensor([2.0 ** -(j + 1) for j in range(H)])
            return -slopes[:, None, None] * (i[:, None] - i).abs()
        return self.table[:, i[:, None] - i + t].detach()

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, H, HD).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.kind == "cosine":
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            return ((q @ k.transpose(-2, -1)) * self.tau).softmax(-1) @ v
        if self.kind == "baddbmm":
            s = torch.baddbmm(
                torch.empty(b * H, t, t), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0.0, alpha=HD**-0.5
            )
            return s.view(b, H, t, t).softmax(-1) @ v
        s = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(HD)
        if self.kind == "softcap":
            s = torch.tanh(s / 3.0) * 3.0
        elif self.kind == "talking":
            s = torch.einsum("bhij,hk->bkij", s, self.mix)
        elif self.kind in ("alibi", "relative"):
            s += self.bias(t)
        s = s.masked_fill(~causal(t), torch.finfo(s.dtype).min)
        if self.kind == "sink":
            s = torch.cat([s, self.sink.view(1, H, 1, 1).expand(b, H, t, 1)], dim=-1)
            return s.softmax(-1)[..., :-1] @ v
        if self.kind == "shifted":
            s = s - s.amax(-1, keepdim=True).detach()
        return s.softmax(dim=-1, dtype=torch.float32) @ v


def biased_dense(m: Biased, x: Tensor) -> list[Dense]:
    wq, wk = heads_of(m.q.weight, H), heads_of(m.k.weight, H)
    t = x.shape[1]
    if m.kind == "baddbmm":
        return [plain("Biased", x, wq, wk, b_q=m.q.bias, b_k=m.k.bias)]
    bias = double(m.bias(t)) if m.kind in ("alibi", "relative") else None
    d = plain("Biased", x, wq, wk, b_q=m.q.bias, b_k=m.k.bias, bias=bias, visible=causal(t))
    if m.kind == "cosine":
        q, k = (y / y.norm(dim=-1, keepdim=True) for y in (d.q, d.k))
        tau = double(m.tau)
        return [Dense("Biased", products(q, k) * tau, wq, wk, q, k, tau.flatten())]
    hidden = ~causal(t)
    if m.kind == "softcap":
        d.logits = (3 * (HD**-0.5 * products(d.q, d.k) / 3).tanh()).masked_fill(hidden, -math.inf)
        d.x_q = None
    elif m.kind == "talking":
        raw = HD**-0.5 * products(d.q, d.k)
        d.logits = torch.einsum("bhij,hk->bkij", raw, double(m.mix)).masked_fill(hidden, -math.inf)
        d.x_q = d.q = None
    elif m.kind == "sink":
        sink = double(m.sink).view(1, H, 1, 1).expand(*d.logits.shape[:3], 1)
        d.logits = torch.cat([d.logits, sink], dim=-1)
        d.x_q = d.q = None
    elif m.kind == "shifted":
        d.logits = d.logits - d.logits.amax(-1, keepdim=True)  # a shift: the floors stay
    return [d]


for kind in ("alibi", "relative", "softcap", "cosine", "talking", "sink", "baddbmm", "shifted"):
    add(f"logits-{kind}", lambda kind=kind: (Biased(kind), tokens()), biased_dense)
