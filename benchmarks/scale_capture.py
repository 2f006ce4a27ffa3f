"""What a measured step adds to a training step, against tokens, heads and layers.

The model is attention alone, and its kernel is replaced by one that costs nothing, so that what is timed is
the watching: reading rows, spectral norms, gradients and updates, the analyzer, the store.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from models import Clock, timed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import entropy_monitor as em

WIDTH = 16  # of the stream: projections are cheap, and have spectral norms all the same
HEAD = 16  # features of a head
_ENOUGH = 0.5  # seconds of repetitions after which a median is taken
_FEWEST, _MOST = 3, 15


class FreeKernel(TorchFunctionMode):
    """While it is on, F.scaled_dot_product_attention returns v, whatever watches it from above."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is F.scaled_dot_product_attention:
            return args[2] * 1
        return function(*args, **(kwargs or {}))


class Attention(nn.Module):
    """Causal self-attention, `[1, T, WIDTH]` to the same."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * heads * HEAD)
        self.out = nn.Linear(heads * HEAD, WIDTH)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, HEAD).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).reshape(b, t, -1))


@dataclass(frozen=True)
class Size:
    """A model of attention alone, and its one sequence."""

    tokens: int = 128
    heads: int = 8  # of a layer
    layers: int = 1


def added_seconds(size: Size, rows: int | str, clock: Clock) -> float:
    """Median time of a measured step less that of a step between; at least 1 µs."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Attention(size.heads) for _ in range(size.layers)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    x = torch.randn(1, size.tokens, WIDTH)
    with tempfile.TemporaryDirectory() as folder, FreeKernel():
        monitor = em.EntropyMonitor(model, optimizer=optimizer, run_dir=f"{folder}/run", every=2, rows=rows)

        def step() -> None:
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss)

        step(), step()  # what is found once; the next step is a measured one
        pairs: list[tuple[float, float]] = []
        while _goes_on(pairs):
            pairs.append((timed(step, clock), timed(step, clock)))
        if monitor.faults:
            raise RuntimeError(f"the monitor failed: {monitor.faults}")
        monitor.close()
    return max(statistics.median(measured - between for measured, between in pairs), 1e-6)


def _goes_on(pairs: list[tuple[float, float]]) -> bool:
    return len(pairs) < _FEWEST or (len(pairs) < _MOST and sum(map(sum, pairs)) < _ENOUGH)
