"""A small decoder, and how it is split over processes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, KEY_HEADS, HEAD, TOKENS, CLASSES, BATCH = 32, 8, 4, 4, 8, 5, 8


class Attention(nn.Module):
    """Keys are shared by groups of queries; `fused` by SDPA, else by hand. Any number of heads is here."""

    def __init__(self, fused: bool, causal: bool) -> None:
        super().__init__()
        self.fused, self.causal = fused, causal
        self.q = nn.Linear(WIDTH, HEADS * HEAD)
        self.k, self.v = (nn.Linear(WIDTH, KEY_HEADS * HEAD, bias=False) for _ in range(2))
        self.o = nn.Linear(HEADS * HEAD, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        # As Llama does, with -1 heads: how many are here, the linear layers say.
        q, k, v = (m(x) for m in (self.q, self.k, self.v))
        q, k, v = (t.view(*t.shape[:2], -1, HEAD).transpose(1, 2) for t in (q, k, v))
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=True)
        else:
            k, v = (t.repeat_interleave(HEADS // KEY_HEADS, dim=1) for t in (k, v))
            logits = q @ k.transpose(-2, -1) / math.sqrt(HEAD)
            hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(
                1 if self.causal else x.shape[1]
            )
            mask = torch.zeros(hidden.shape, dtype=x.dtype).masked_fill(hidden, -1e9)
            out = (logits + like(mask, logits)).softmax(-1) @ v
        return self.o(out.transpose(1, 2).flatten(2))


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A copy on every process, where `other` is a DTensor."""
    if not hasattr(other, "device_mesh"):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(tensor, other.device_mesh, [Replicate()], run_check=False)


class Block(nn.Module):
    """Attention and a feed-forward net, each after a norm."""

    def __init__(self, fused: bool, causal: bool) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = Attention(fused, causal)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    """Two blocks, one of each kind of attention; `idle` is a layer that no forward uses."""

    def __init__(self, causal: bool = True, idle: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(fused, causal) for fused in (True, False))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.idle = nn.Linear(2, 2) if idle else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class Grouped(nn.Module):
    """Attention whose query heads may be fewer than the keys are for; `first` is the first that is here."""

    def __init__(self, heads: int, key_heads: int) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.heads, self.key_heads, self.first = heads, key_heads, 0
        self.q = nn.Linear(WIDTH, heads * HEAD)
        self.k, self.v = (nn.Linear(WIDTH, key_heads * HEAD) for _ in range(2))
        with torch.no_grad():
            self.q.weight *= 1 + torch.arange(heads).repeat_interleave(HEAD)[:, None]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x) for m in (self.q, self.k, self.v))
        q, k, v = (t.view(*t.shape[:2], -1, HEAD).transpose(1, 2) for t in (q, k, v))
        # The key heads of the query heads that are here, one for each.
        here = [(self.first + i) * self.key_heads // self.heads for i in range(q.shape[1])]
        if self.key_heads > 1:
            k, v = (
                torch.cat([k[:, h : h + 1] for h in here], 1),
                torch.cat([v[:, h : h + 1] for h in here], 1),
            )
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def decoder(seed: int = 0, **options: Any) -> Decoder:
    """The same model at every call, sharp enough for its heads to differ."""
    torch.manual_seed(seed)
    model = Decoder(**options)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.q.weight *= 1 + torch.arange(HEADS).repeat_interleave(HEAD)[:, None]
    return model


def batches(part: int = 0, parts: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless global batches, of which every process takes its part."""
    generator = torch.Generator().manual_seed(1)
    while True:
        x = torch.randn(BATCH, TOKENS, WIDTH, generator=generator)
        y = torch.randint(0, CLASSES, (BATCH,), generator=generator)
        yield x.chunk(parts)[part], y.chunk(parts)[part]
