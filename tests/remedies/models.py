"""What the tests of the remedies train."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from entropy_monitor.demo.vit import VisionTransformer


def vit(*, depth: int = 2, width: int = 16, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    return VisionTransformer(16, 4, 10, width=width, depth=depth, heads=2).to(dtype)


def images(count: int = 8, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 16, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(
        dtype
    )


def classes(count: int = 8) -> Tensor:
    return torch.arange(count) % 10


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x).float(), classes(len(x)))


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor | None = None) -> float:
    loss = loss_of(model, images(dtype=next(model.parameters()).dtype) if x is None else x)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
