"""What a measured step adds to a training step, against tokens, heads and layers.

The model is attention alone, and its kernel is replaced by one that costs nothing, so that what is timed is
the watching: reading rows, the analyzer, the store, and in steps that are read in full spectral norms,
gradients and updates.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from models import Clock, timed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import entropy_monitor as em
from entropy_monitor import StepReport
from entropy_monitor.schedule import Schedule

WIDTH = 16  # of the stream: projections are cheap, and have spectral norms all the same
HEAD = 16  # features of a head
_ENOUGH = 2.0  # seconds of repetitions after which medians are taken
_FEWEST, _MOST = 5, 50  # of either kind; 300 steps of uniform attention would be suspect, and read in full


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


@dataclass(frozen=True)
class Added:
    """What a measured step takes more than one between, in seconds: medians, at least 1 µs each."""

    alone: float
    in_full: float


def added_seconds(size: Size, rows: int | str, clock: Clock) -> Added:
    """Of steps that read rows alone, and of those that read weights, gradients and updates too; by turns."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Attention(size.heads) for _ in range(size.layers)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    x = torch.randn(1, size.tokens, WIDTH)
    with tempfile.TemporaryDirectory() as folder, FreeKernel():
        monitor = em.EntropyMonitor(model, optimizer=optimizer, run_dir=f"{folder}/run", every=2, rows=rows)

        def step() -> StepReport:
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return monitor.step(loss)

        def more(in_full: bool) -> float:
            """Seconds of a measured step less those of the one before it."""
            # The first of a run are all in full, and large models would never come past them.
            with mock.patch.object(Schedule, "in_full", in_full):
                between = timed(step, clock)
                start = clock()
                report = step()
                seconds = clock() - start
            if not report.measured:
                raise RuntimeError(f"step {report.step} was to be measured: {monitor.faults}")
            return seconds - between

        step()  # what is found once
        begin = clock()
        for in_full in (False, True):
            more(in_full)
        found: dict[bool, list[float]] = {False: [], True: []}
        while len(found[True]) < _FEWEST or (len(found[True]) < _MOST and clock() - begin < _ENOUGH):
            for in_full, differences in found.items():
                differences.append(more(in_full))
        if monitor.faults:
            raise RuntimeError(f"the monitor failed: {monitor.faults}")
        monitor.close()
    return Added(*(max(statistics.median(differences), 1e-6) for differences in found.values()))
