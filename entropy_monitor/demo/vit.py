"""A pre-LN Vision Transformer small enough to collapse in half a minute."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head self-attention through PyTorch's fused kernel."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, width]` to `[B, T, width]`."""
        b, t, width = x.shape
        q, k, v = (
            layer(x).view(b, t, self.heads, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(y.transpose(1, 2).reshape(b, t, width))
        return out


class Block(nn.Module):
    """Attention and MLP, each behind its LayerNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, width]` to `[B, T, width]`."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class VisionTransformer(nn.Module):
    """Classifies sequences of image patches.

    Args:
        tokens: patches of an image.
        patch_size: numbers in a patch.
        classes: how many.
        width: of the residual stream.
        depth: blocks.
        heads: per block.
    """

    def __init__(
        self, tokens: int, patch_size: int, classes: int, *, width: int = 64, depth: int = 6, heads: int = 4
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(patch_size, width)
        self.position = nn.Parameter(torch.randn(1, tokens, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, classes)

    def forward(self, patches: Tensor) -> Tensor:
        """`[B, T, patch_size]` to logits `[B, classes]`."""
        x = self.embed(patches) + self.position
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.classify(self.norm(x).mean(1))
        return out
