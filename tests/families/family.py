"""What a family is: how it is built and called, and where the weights of each head lie."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

VOCAB, B, T = 50, 2, 14
DROPOUT = 0.1

Build = Callable[[str, float], nn.Module]
"""From an attention implementation and a dropout to a model, in train mode, of any weights."""


@dataclass(frozen=True)
class Call:
    """One attention call: who owns it, and W_Q, W_K of each query head, `[H, in, d_head]`, float64."""

    layer: str
    w_q: Tensor
    w_k: Tensor


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        name: the family's name.
        build: see `Build`.
        inputs: makes the keyword arguments of a forward.
        calls: the attention calls of one forward, in order of execution, with weights cut by hand.
        implementations: the ways in which it can attend.
        gain: how much larger than `1/√in` random weights are, so that attention is far from uniform.
        within: what its eager forward must run within to be the reference.
    """

    name: str
    build: Build
    inputs: Callable[[], dict[str, Tensor]]
    calls: Callable[[Any], list[Call]]
    implementations: tuple[str, ...]
    gain: float = 1.6
    within: Callable[[], AbstractContextManager[None]] = nullcontext

    def model(self, implementation: str, dropout: float = 0.0) -> nn.Module:
        """The family's model, the same weights for every implementation, in eval mode."""
        torch.manual_seed(0)
        model = self.build(implementation, dropout)
        randomise(model, self.gain)
        return model.eval()


FAMILIES: dict[str, Family] = {}

ALL = ("eager", "sdpa", "flex_attention")
UNFLEXED = ("eager", "sdpa")


def add(
    name: str,
    build: Build,
    inputs: Callable[[], dict[str, Tensor]],
    calls: Callable[[Any], list[Call]],
    implementations: tuple[str, ...] = ALL,
    gain: float = 1.6,
    within: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Enter a family."""
    FAMILIES[name] = Family(name, build, inputs, calls, implementations, gain, within)


def hugging_face(kind: str, options: dict[str, Any], dropouts: tuple[str, ...]) -> Build:
    """Builds `transformers`' model class `kind` from its configuration; `dropouts` are set to the dropout."""

    def build(implementation: str, dropout: float) -> nn.Module:
        import transformers

        cls = getattr(transformers, kind)
        config = cls.config_class(**options, **dict.fromkeys(dropouts, dropout))
        model: nn.Module = cls._from_config(config, attn_implementation=implementation)
        return model

    return build


@torch.no_grad()
def randomise(model: nn.Module, gain: float) -> None:
    """Draw all weights anew, larger than at initialisation, norms and biases too."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.dim() > 1:
            p.copy_(noise * gain / math.sqrt(p[0].numel()))
        else:
            p.add_(0.3 * noise)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.weight.copy_(torch.randn(module.weight.shape, generator=generator))


def tokens(t: int = T, seed: int = 0) -> Tensor:
    """Random token ids, `[B, t]`, none of them padding (0)."""
    return torch.randint(3, VOCAB, (B, t), generator=torch.Generator().manual_seed(seed))


def padding(left: int = 0, right: int = 0, t: int = T) -> Tensor:
    """A padding mask, `[B, t]`: the last sequence is padded."""
    mask = torch.ones(B, t, dtype=torch.long)
    mask[-1, :left] = 0
    mask[-1, t - right :] = 0
    return mask


def heads_of(weight: Tensor, heads: int, shared_by: int = 1) -> Tensor:
    """`[heads · d, in]` to `[heads · shared_by, in, d]`, float64."""
    w = weight.detach().double().reshape(heads, -1, weight.shape[1]).transpose(1, 2)
    return w.repeat_interleave(shared_by, 0)
