"""Small models that are quick to compile."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

WIDTH, HEADS, TOKENS, CLASSES = 16, 4, 6, 3


class Attention(nn.Module):
    """Four linear maps around SDPA, with dropout."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.dropout = HEADS, dropout
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def heads(self, x: Tensor) -> list[Tensor]:
        return [m(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for m in (self.q, self.k, self.v)]

    def join(self, y: Tensor) -> Tensor:
        return self.o(y.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        p = self.dropout if self.training else 0.0
        return self.join(F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p))


class ByHand(Attention):
    """A softmax written out, of fused projections."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        del self.q, self.k, self.v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        logits = (q @ k.transpose(-2, -1)) * (WIDTH // HEADS) ** -0.5
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        maps = logits.masked_fill(~causal, float("-inf")).softmax(-1)
        return self.join(F.dropout(maps, self.dropout, self.training) @ v)


class Capped(Attention):
    """Rotated, normalised queries and keys, and a soft cap on their products."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        q, k = (F.rms_norm(y, y.shape[-1:]) for y in (q, k))
        angle = torch.arange(x.shape[1], device=x.device)[:, None] * torch.tensor([1.0, 0.1], device=x.device)
        q, k = (_rotated(y, angle).type_as(y) for y in (q, k))
        logits = 5 * torch.tanh(q @ k.transpose(-2, -1) / 5)
        return self.join(logits.softmax(-1, dtype=torch.float32).type_as(v) @ v)


def _rotated(x: Tensor, angle: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)


class BreakBetween(Attention):
    """The graph breaks when q is known and k is not yet."""

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        torch._dynamo.graph_break()
        k, v = (m(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for m in (self.k, self.v))
        return self.join(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class Disabled(Attention):
    """Not compiled, as flash attention's wrappers often are."""

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Odd(Attention):
    """Does not call itself `self`, and breaks the graph."""

    def forward(me, x: Tensor) -> Tensor:
        q, k, v = me.heads(x)
        torch._dynamo.graph_break()
        return me.join(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class VectorMapped(Attention):
    """Has a vmap and a functional gradient beside its attention."""

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.func.grad(lambda y: y.square().sum())(x.detach())
        return torch.vmap(lambda y: 2 * y)(super().forward(x + 0.1 * scale))


class Double(torch.autograd.Function):
    """A function of the user's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


class BesideFunction(Attention):
    """Next to a custom autograd function."""

    def forward(self, x: Tensor) -> Tensor:
        return Double.apply(super().forward(x))


class Block(nn.Module):
    """Attention and a small MLP."""

    def __init__(self, attention: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.attn, self.norm, self.mlp = attention, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attn(self.norm(x)))
        return x + F.gelu(self.mlp(x))


class Net(nn.Module):
    """Blocks and a classifier.

    Args:
        attention: class of the blocks' attention.
        layers: how many blocks.
        dropout: everywhere.
        times: how often each block runs.
        checkpointing: how blocks are computed again in backward: reentrant or not, or all but attention.
        breaks: break the graph between blocks.
    """

    def __init__(
        self,
        attention: type[nn.Module] = Attention,
        *,
        layers: int = 2,
        dropout: float = 0.0,
        times: int = 1,
        checkpointing: str = "",
        breaks: bool = False,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(attention(dropout), dropout) for _ in range(layers))
        self.head = nn.Linear(WIDTH, CLASSES)
        self.times, self.checkpointing, self.breaks = times, checkpointing, breaks

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            for _ in range(self.times):
                x = _checkpointed(block, x, self.checkpointing)
                if self.breaks:
                    torch._dynamo.graph_break()
        return self.head(x.mean(1))


def _checkpointed(block: nn.Module, x: Tensor, how: str) -> Tensor:
    if not how:
        return block(x)
    selective = functools.partial(create_selective_checkpoint_contexts, _save_attention)
    more = {"context_fn": selective} if how == "selective" else {}
    result = checkpoint(block, x, use_reentrant=how == "reentrant", **more)
    assert isinstance(result, Tensor)
    return result


def _save_attention(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = "attention" in str(operator)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def built(attention: type[nn.Module] = Attention, **options: Any) -> Callable[[], nn.Module]:
    """How to build a `Net`."""
    return functools.partial(Net, attention, **options)


def tied() -> nn.Module:
    """Blocks that share the weights of q and k, and no module."""
    net = Net(layers=3)
    first = net.blocks[0].attn
    for block in net.blocks[1:]:
        block.attn.q.weight, block.attn.k.weight = first.q.weight, first.k.weight
    return net


def frozen() -> nn.Module:
    """The first block does not learn, nor do the keys of the second."""
    net = Net(layers=3)
    net.blocks[0].requires_grad_(False)
    net.blocks[1].attn.k.requires_grad_(False)
    return net


class Encoded(nn.Module):
    """A frozen encoder without gradients before a network that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.net = Net(layers=1), Net(layers=1)
        self.encoder.head = nn.Linear(WIDTH, WIDTH)
        self.encoder.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            seen = self.encoder(x)
        return self.net(x + seen[:, None])


class Normed(nn.Module):
    """Batch norm, whose buffers every forward moves."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.net = nn.BatchNorm1d(WIDTH), Net(layers=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.bn(x.flatten(0, 1)).unflatten(0, x.shape[:2]))


class Shaped(nn.Module):
    """Many layers of one class, each of its own width."""

    def __init__(self, widths: Sequence[int] = (4, 8, 12, 16, 20, 24)) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Narrow(width) for width in widths)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class _Narrow(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv, self.o = nn.Linear(WIDTH, 3 * width), nn.Linear(width, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Core(nn.Module):
    """Attention of q, k and v, without a parameter of its own."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Cored(Attention):
    """Leaves attention itself to a module, or to whatever else is put there."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.core: Callable[..., Tensor] = Core()

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.core(*self.heads(x)))
