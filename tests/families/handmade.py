"""Modules in the style of nanoGPT and timm, taken from the zoo."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.families.family import UNFLEXED, B, Call, T, add, heads_of, tokens
from tests.zoo.decoders import NanoGPT
from tests.zoo.encoders import D, H, TimmAttention


class TimmBlocks(nn.Module):
    """Two blocks of timm's attention."""

    def __init__(self, fused: bool, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(2))
        self.blocks = nn.ModuleList(TimmAttention(fused) for _ in range(2))
        for block in self.blocks:
            block.attn_drop.p = dropout

    def forward(self, x: Tensor) -> Tensor:
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return x


def nanogpt(model: Any) -> list[Call]:
    found = []
    for i, block in enumerate(model.h):
        q, k, _ = block.attn.c_attn.weight.detach().split(D)
        found.append(Call(f"h.{i}.attn", heads_of(q, H), heads_of(k, H)))
    return found


def timm(model: Any) -> list[Call]:
    found = []
    for i, block in enumerate(model.blocks):
        q, k, _ = block.qkv.weight.detach().split(D)
        found.append(Call(f"blocks.{i}", heads_of(q, H), heads_of(k, H)))
    return found


add(
    "nanogpt",
    lambda implementation, dropout: NanoGPT(implementation == "sdpa", dropout),
    lambda: {"ids": tokens()},
    nanogpt,
    UNFLEXED,
)
add(
    "timm",
    lambda implementation, dropout: TimmBlocks(implementation == "sdpa", dropout),
    lambda: {"x": torch.randn(B, T, D, generator=torch.Generator().manual_seed(0))},
    timm,
    UNFLEXED,
)
