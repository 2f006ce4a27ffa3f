"""What is trained, and the training that nothing watches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from models import ByteModel, Shape, batch_of_text
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Setting:
    """What is trained, and how. The batch of step i is that of seed `i % batches`."""

    shape: Shape
    device: str = "cpu"
    bf16: bool = False
    compiled: bool = False
    dropout: float = 0.0
    rate: float = 1e-4
    batches: int = 1
    every: int = 2
    weights: Mapping[str, Tensor] | None = None


class Plain:
    """Fused attention, nothing watched; the base of the others.

    Call `measured`, then `every - 1` times `between`, and again. `entropies` returns what the measured steps
    read, `[steps, layers, heads]`, nats, float64; it ends the watching, as `account` does. `rows_read` is
    known from then on.
    """

    remark = ""
    beginning = 1  # measured steps that are not like the later ones

    def __init__(self, setting: Setting) -> None:
        torch.manual_seed(0)
        self.setting = setting
        self.model = ByteModel(setting.shape, setting.dropout)
        if setting.weights is not None:
            self.model.load_state_dict(setting.weights)
        self.model.to(setting.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=setting.rate)
        self.run = torch.compile(self.model) if setting.compiled else self.model
        pairs = [batch_of_text(setting.shape, seed) for seed in range(setting.batches)]
        self.batches = [(x.to(setting.device), y.to(setting.device)) for x, y in pairs]
        self.steps = 0
        self.settled = 0  # the first step that counts
        self.read: list[Tensor] = []
        self.rows_read = setting.shape.tokens  # of each sequence

    def precision(self) -> AbstractContextManager[object]:
        kind = torch.device(self.setting.device).type
        return torch.autocast(kind, torch.bfloat16) if self.setting.bf16 else nullcontext()

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)

    def train(self, before_update: Callable[[Tensor], None] | None = None) -> Tensor:
        """One step; `before_update` is given the batch, once gradients are there."""
        x, y = self.batches[self.steps % len(self.batches)]
        self.steps += 1
        with self.precision():
            loss = F.cross_entropy(self.forward(x).flatten(0, 1), y.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        if before_update is not None:
            before_update(x)
        self.optimizer.step()
        return loss.detach()

    @property
    def in_full(self) -> bool | None:
        """Whether the coming measured step reads more than others; None where all are alike."""
        return None

    def measured(self) -> None:
        self.train()

    def between(self) -> None:
        self.train()

    def entropies(self) -> Tensor:
        return torch.stack(self.read)

    def account(self) -> tuple[str, str]:
        """Rows of a sequence that were read from step `settled` on, and a remark, as text."""
        return str(self.rows_read), ""

    def close(self) -> None:
        """Leave nothing behind."""
