"""Tiny models and trainings for the tests of the monitor."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from entropy_monitor.records import HEADS, LAYERS, AlertEvent, Record, RunInfo, Sink

torch.set_num_threads(1)  # with tensors this small, threads only wait for each other

WIDTH, HEADS_N, TOKENS, CLASSES = 8, 2, 6, 3


class SeparateAttention(nn.Module):
    """Four linear layers around SDPA, with dropout."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (HEADS_N, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.o(out.transpose(1, 2).flatten(2))


class FusedAttention(nn.Module):
    """One projection for q, k and v, and a softmax by hand."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(x).reshape(B, T, 3, HEADS_N, D // HEADS_N).permute(2, 0, 3, 1, 4).unbind(0)
        maps = self.drop((q @ k.transpose(-2, -1) / math.sqrt(D // HEADS_N)).softmax(dim=-1))
        return self.proj((maps @ v).transpose(1, 2).reshape(B, T, D))


class TorchAttention(nn.Module):
    """`nn.MultiheadAttention`."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(WIDTH, HEADS_N, dropout=dropout, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x, x, need_weights=False)[0]


ATTENTIONS: tuple[type[nn.Module], ...] = (SeparateAttention, FusedAttention, TorchAttention)


class Tiny(nn.Module):
    """Two residual attention layers, a convolution and a classifier."""

    def __init__(self, attention: type[nn.Module] = SeparateAttention, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(attention(dropout) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 1)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + self.drop(block(self.norm(x)))
        return self.head(self.conv(x.transpose(1, 2)).mean(-1))


def tiny(attention: type[nn.Module] = SeparateAttention, dropout: float = 0.0, seed: int = 0) -> Any:
    """A model that is the same at every call."""
    torch.manual_seed(seed)
    return Tiny(attention, dropout)


def batches(seed: int = 1, size: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
    """The same endless batches at every call; the global random state is not touched."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(size, TOKENS, WIDTH, generator=generator)
        yield x, torch.randint(0, CLASSES, (size,), generator=generator)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    after: Callable[[Tensor], Any] = lambda loss: None,
    data: Iterator[tuple[Tensor, Tensor]] | None = None,
) -> list[float]:
    """A plain training loop that calls `after(loss)` at the end of every step."""
    data = batches() if data is None else data
    losses = []
    for _ in range(steps):
        x, y = next(data)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after(loss)
        losses.append(loss.item())
    return losses


def flat(model: nn.Module) -> Tensor:
    """All parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class ListSink(Sink):
    """Keeps what it gets."""

    def __init__(self) -> None:
        self.info: RunInfo | None = None
        self.items: list[Record | AlertEvent] = []
        self.calls: list[str] = []
        self.flushed = threading.Event()

    def open(self, info: RunInfo) -> None:
        self.info = info

    def log(self, record: Record) -> None:
        self.calls.append("log")
        self.items.append(record)

    def alert(self, event: AlertEvent) -> None:
        self.calls.append("alert")
        self.items.append(event)

    def flush(self) -> None:
        self.calls.append("flush")
        self.flushed.set()

    def close(self) -> None:
        self.calls.append("close")

    @property
    def records(self) -> list[Record]:
        return [item for item in self.items if isinstance(item, Record)]

    @property
    def events(self) -> list[AlertEvent]:
        return [item for item in self.items if isinstance(item, AlertEvent)]

    def scalars(self) -> list[tuple[int, str, float]]:
        rows = (r.scalars for r in self.records)
        return [
            (int(s), str(n), float(v))
            for c in rows
            for s, n, v in zip(c["step"], c["name"], c["value"], strict=True)
        ]

    def column(self, table: str, name: str) -> np.ndarray[Any, Any]:
        """One column over all records."""
        return np.concatenate([np.asarray(getattr(r, table)[name]) for r in self.records])


def record(step: int = 0, **heads: Any) -> Record:
    """A record of no rows."""
    return Record(step, {**HEADS.empty(), **heads}, LAYERS.empty())
