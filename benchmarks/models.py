"""The model of the benchmarks: a small GPT on bytes, whose attention can be fused or written out."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BYTES = 256


@dataclass(frozen=True)
class Shape:
    """A model and its batch."""

    layers: int
    width: int
    heads: int
    tokens: int
    batch: int


SHAPES = {
    "S1": Shape(layers=6, width=384, heads=6, tokens=512, batch=4),
    "S2": Shape(layers=4, width=256, heads=4, tokens=2048, batch=1),
    "smoke": Shape(layers=2, width=32, heads=2, tokens=32, batch=2),
}

Maps = list[Tensor]
Observer = Callable[[Tensor, Tensor, Tensor, Tensor], None]


class Attention(nn.Module):
    """Causal self-attention: the fused kernel, or written out where maps are asked for.

    `observers` are called with q, k, v and the result of every call, as they enter and leave the product.
    """

    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.out = nn.Linear(shape.width, shape.width)
        self.heads, self.dropout = shape.heads, dropout
        self.observers: list[Observer] = []
        unseen = torch.ones(shape.tokens, shape.tokens, dtype=torch.bool).triu(1)
        self.register_buffer("unseen", unseen, persistent=False)

    def forward(self, x: Tensor, maps: Maps | None = None) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        p = self.dropout if self.training else 0.0
        if maps is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
        else:
            logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            weights = logits.masked_fill(self.unseen[:t, :t], -torch.inf).softmax(-1)
            weights = F.dropout(weights, p)
            maps.append(weights)
            y = weights.to(v.dtype) @ v
        for observer in self.observers:
            observer(q, k, v, y)
        return self.out(y.transpose(1, 2).reshape(b, t, d))


class Block(nn.Module):
    """A pre-LN block."""

    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.attn = Attention(shape, dropout)
        self.norm1, self.norm2 = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.mlp = nn.Sequential(
            nn.Linear(shape.width, 4 * shape.width), nn.GELU(), nn.Linear(4 * shape.width, shape.width)
        )

    def forward(self, x: Tensor, maps: Maps | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), maps)
        return x + self.mlp(self.norm2(x))


class ByteModel(nn.Module):
    """Predicts the next byte. Bytes `[B, T]` to logits `[B, T, 256]`; maps are appended, one a layer."""

    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(BYTES, shape.width)
        self.places = nn.Embedding(shape.tokens, shape.width)
        self.blocks = nn.ModuleList(Block(shape, dropout) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, BYTES)

    def forward(self, tokens: Tensor, maps: Maps | None = None) -> Tensor:
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, maps)
        return self.head(self.norm(x))


@cache
def text() -> Tensor:
    """The start of Python's standard library, as bytes: int64 `[N]`."""
    found = bytearray()
    for path in sorted(Path(statistics.__file__).parent.glob("*.py")):
        found += path.read_bytes()
        if len(found) > 2_000_000:
            break
    return torch.frombuffer(found, dtype=torch.uint8).long()


def batch_of_text(shape: Shape, seed: int) -> tuple[Tensor, Tensor]:
    """Bytes and the bytes that follow them, `[B, T]` each; always the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(text()) - shape.tokens - 1, (shape.batch,), generator=generator)
    rows = text()[starts[:, None] + torch.arange(shape.tokens + 1)]
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


Clock = Callable[[], float]

CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
"""Time that passes; or that processors spend on this process, steadier where others use them too."""


def timed(action: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    """Seconds that an action takes."""
    start = clock()
    action()
    return clock() - start


def spread(values: Sequence[float]) -> str:
    """Median, and the 10th and 90th percentile."""
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
    return f"{statistics.median(values):.3f} ({low:.3f} … {high:.3f})"


def machine(device: str) -> str:
    """What this runs on."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
        name = models[0].split(":")[1].strip() if models else name
    threads = torch.get_num_threads()
    where = f"{name}, {threads} thread{'s' if threads > 1 else ''}"
    if device == "cuda":
        where = f"{torch.cuda.get_device_name()} ({where})"
    return f"{where}; torch {torch.__version__}, Python {platform.python_version()}"
