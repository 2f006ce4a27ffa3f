"""Encoders and torch's own: ViT, Swin windows, Perceiver, nn.MultiheadAttention and nn.Transformer."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.dense import Dense, add, causal, double, heads_of, plain

D, H, T, B = 32, 4, 11, 3
HD = D // H


class TimmAttention(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.scale, self.fused = H, HD**-0.5, fused
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.q_norm, self.k_norm, self.attn_drop = nn.Identity(), nn.Identity(), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            q = q * self.scale
            attn = q @ k.transpose(-2, -1)
            x = self.attn_drop(attn.softmax(dim=-1)) @ v
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


class ViT(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.norm, self.attn, self.head = nn.LayerNorm(D), TimmAttention(fused), nn.Linear(D, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.attn(self.norm(x))).mean(1)).softmax(-1)


def vit_dense(m: ViT, x: Tensor) -> list[Dense]:
    x = F.layer_norm(double(x), (D,), double(m.norm.weight), double(m.norm.bias))
    (wq, wk, _), (bq, bk, _) = m.attn.qkv.weight.split(D), m.attn.qkv.bias.split(D)
    return [plain("attn", x, heads_of(wq, H), heads_of(wk, H), b_q=bq, b_k=bk)]


for fused, train in product((False, True), (False, True)):
    add(
        f"timm-{'fused' if fused else 'plain'}-{'train' if train else 'eval'}",
        lambda fused=fused: (ViT(fused), torch.randn(B, T, D) * 2),
        vit_dense,
        train=train,
    )


class Swin(nn.Module):
    """Windows folded into the batch; relative position bias; a mask of -100 between regions."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv = H, nn.Linear(D, 3 * D)
        self.table = nn.Parameter(torch.randn(7, H))

    def masks(self) -> Tensor:
        m = torch.zeros(2, 4, 4)
        m[1, :2, 2:] = m[1, 2:, :2] = -100.0
        return m

    def bias(self) -> Tensor:
        i = torch.arange(4)
        return self.table[i[:, None] - i + 3].permute(2, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        bw, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(bw, n, 3, H, HD).permute(2, 0, 3, 1, 4)
        attn = (q * HD**-0.5) @ k.transpose(-2, -1)
        attn = attn + self.bias().unsqueeze(0)
        mask = self.masks()
        attn = attn.view(bw // 2, 2, H, n, n) + mask.unsqueeze(1).unsqueeze(0)
        attn = attn.view(-1, H, n, n)
        return attn.softmax(-1) @ v


def swin_dense(m: Swin, x: Tensor) -> list[Dense]:
    wq, wk, _ = m.qkv.weight.split(D)
    bq, bk, _ = m.qkv.bias.split(D)
    bias = double(m.bias())[None] + double(m.masks()).repeat(x.shape[0] // 2, 1, 1)[:, None]
    return [plain("Swin", x, heads_of(wq, H), heads_of(wk, H), b_q=bq, b_k=bk, bias=bias)]


add("swin", lambda: (Swin(), torch.randn(6, 4, D) * 2), swin_dense)


class Perceiver(nn.Module):
    """Learned latents attend to inputs of another width; keys and values fused."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(5, D))
        self.to_q, self.to_kv = nn.Linear(D, D, bias=False), nn.Linear(20, 2 * D, bias=False)
        self.heads = H

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        z = self.latents.expand(x.shape[0], -1, -1)
        q, (k, v) = self.to_q(z), self.to_kv(x).chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (H, HD)).permute(0, 2, 1, 3).flatten(0, 1) for y in (q, k, v))
        sim = torch.einsum("b i d, b j d -> b i j", q, k) * HD**-0.5
        sim.masked_fill_(~mask[:, None, None].expand(-1, H, 1, -1).flatten(0, 1), -torch.finfo(sim.dtype).max)
        return torch.einsum("b i j, b j d -> b i d", sim.softmax(dim=-1), v)


def perceiver_dense(m: Perceiver, x: Tensor, mask: Tensor) -> list[Dense]:
    z = m.latents.expand(x.shape[0], -1, -1)
    wk = heads_of(m.to_kv.weight[:D], H)
    d = plain("Perceiver", z, heads_of(m.to_q.weight, H), wk, x_kv=x, visible=mask[:, None, None])
    return [d]


add(
    "perceiver",
    lambda: (Perceiver(), torch.randn(B, 13, 20) * 3, torch.rand(B, 13) > 0.3),
    perceiver_dense,
)


class MHA(nn.Module):
    def __init__(self, options: dict[str, Any], call: dict[str, Any], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(D, H, **options)
        self.options, self.call, self.shape = options, call, shape
        for p in (self.attn.in_proj_bias, self.attn.bias_k):
            if p is not None:
                nn.init.normal_(p)

    def masks(self) -> dict[str, Any]:
        out: dict[str, Any] = {}
        t = s = T
        g = torch.Generator().manual_seed(7)
        kind = self.call.get("mask")
        if kind == "bool":
            out["attn_mask"] = ~causal(t)
        elif kind == "float":
            out["attn_mask"] = torch.zeros(t, s).masked_fill(~causal(t), -math.inf)
        elif kind == "bias3d":
            out["attn_mask"] = torch.randn(B * H, t, s, generator=g)
        elif kind == "is_causal":
            out["attn_mask"] = nn.Transformer.generate_square_subsequent_mask(t)
            out["is_causal"] = True
        if self.call.get("pad"):
            pad = torch.zeros(B, s, dtype=torch.bool)
            pad[0, 8:] = True
            pad[1, :] = kind is None  # a sequence of nothing but padding
            out["key_padding_mask"] = pad
        return out

    def forward(self, q: Tensor, kv: Tensor) -> Tensor:
        return self.attn(q, kv, kv, need_weights=self.call.get("weights", True), **self.masks())[0]


def mha_dense(m: MHA, q: Tensor, kv: Tensor) -> list[Dense]:
    a = m.attn
    if q.dim() == 2:
        q, kv = q[None], kv[None]
    elif not m.options.get("batch_first"):
        q, kv = q.transpose(0, 1), kv.transpose(0, 1)
    if a.in_proj_weight is not None:
        wq, wk, _ = a.in_proj_weight.split(D)
    else:
        wq, wk = a.q_proj_weight, a.k_proj_weight
    bq, bk = (None, None) if a.in_proj_bias is None else a.in_proj_bias.split(D)[:2]
    masks, bias = m.masks(), None
    b, t, s = q.shape[0], q.shape[1], kv.shape[1]
    visible = torch.ones(b, 1, t, s, dtype=torch.bool)
    mask = masks.get("attn_mask")
    if mask is not None and mask.dtype == torch.bool:
        visible = visible & ~mask
    elif mask is not None:
        visible = visible & (mask.unflatten(0, (b, H)) if mask.dim() == 3 else mask).isfinite()
        bias = double(mask.unflatten(0, (b, H))) if mask.dim() == 3 else None
    if "key_padding_mask" in masks:
        visible = visible & ~masks["key_padding_mask"][:, None, None]
    extra = []
    d = plain("attn", q, heads_of(wq, H), heads_of(wk, H), b_q=bq, b_k=bk, x_kv=kv, bias=bias)
    if a.bias_k is not None:
        extra.append(double(a.bias_k).reshape(1, H, 1, HD).expand(b, -1, -1, -1))
    if a.add_zero_attn:
        extra.append(torch.zeros(b, H, 1, HD, dtype=torch.float64))
    if extra:
        d.k = torch.cat([d.k, *extra], dim=2)
        d.x_q = None
        d.logits = HD**-0.5 * torch.einsum("bhtd,bhsd->bhts", d.q, d.k)
        visible = F.pad(visible, (0, len(extra)), value=True)
    d.logits = d.logits.masked_fill(~visible, -math.inf)
    return [d]


def _mha(name: str, options: dict[str, Any], call: dict[str, Any], same: bool = True) -> None:
    def build() -> tuple[Any, ...]:
        width = options.get("kdim", D)
        shape = (B, T) if options.get("batch_first") else (T, B)
        if call.get("unbatched"):
            shape = (T,)
        q = torch.randn(*shape, D) * 2
        return MHA(options, call, shape), q, q if same else torch.randn(*shape, width) * 2

    add(f"mha-{name}", build, mha_dense)


for weights, first in product((False, True), (False, True)):
    label = f"{'weights' if weights else 'noweights'}-{'batch' if first else 'seq'}"
    _mha(label, {"batch_first": first}, {"weights": weights})
for weights in (False, True):
    for mask in ("bool", "float", "bias3d", "is_causal"):
        _mha(f"{mask}-{weights}", {"batch_first": True}, {"weights": weights, "mask": mask})
    _mha(f"padding-{weights}", {"batch_first": True}, {"weights": weights, "pad": True})
    _mha(f"both-{weights}", {"batch_first": True}, {"weights": weights, "pad": True, "mask": "bool"})
    _mha(f"biaskv-{weights}", {"add_bias_kv": True}, {"weights": weights, "pad": True, "mask": "bool"})
    _mha(
        f"zero-{weights}", {"add_zero_attn": True, "add_bias_kv": True}, {"weights": weights, "mask": "float"}
    )
    _mha(f"kdim-{weights}", {"kdim": 20, "vdim": 20, "batch_first": True}, {"weights": weights}, same=False)
    _mha(f"unbatched-{weights}", {"bias": False}, {"weights": weights, "unbatched": True})
    _mha(f"cross-{weights}", {"batch_first": True}, {"weights": weights}, same=False)
