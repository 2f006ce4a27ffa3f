"""SIBERT: a scale-invariant encoder, trained by SGD with weight decay and relative global clipping.

The recipe of Li et al. (ICML 2022), without momentum and warmup. `python examples/sibert.py`: the norm stays
near its equilibrium. `python examples/sibert.py --init-scale 10 --weight-decay 0.02`: weight decay brings ten
times larger weights back, which takes about log(10) / (learning rate · weight decay) steps.
"""

from __future__ import annotations

import argparse
import os
from collections import deque
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import entropy_monitor as em
from entropy_monitor.measures import effective_learning_rate, equilibrium_norm

CONTEXT = 32
BYTES = 128
MASK = BYTES  # one more token
HIDDEN = 0.15  # share of the bytes that the model has to guess


def norm(x: Tensor) -> Tensor:
    """A layer norm without affine; its eps is not felt, even where all parameters are 1e-4 times as large."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-30)


class Attention(nn.Module):
    """Self-attention whose weights no scale changes; no biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, width]` to `[B, T, width]`."""
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = em.scale_invariant_attention(q @ k.mT * q.shape[-1] ** -0.5)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Both branches begin and end with a norm, so that what they add has degree 0, as what it is added to."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, width]` to `[B, T, width]`."""
        x = x + norm(self.attention(norm(x)))
        return x + norm(self.down(F.relu(self.up(norm(x)))))


class Sibert(nn.Module):
    """A masked language model of bytes, 0-homogeneous in all its parameters: `f(c x) = f(x)`.

    Embeddings are normed where they enter, and the rows of the head have unit norm: logits are cosines, times
    a constant.
    """

    def __init__(self, width: int = 64, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(BYTES + 1, width)
        self.places = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.head = nn.Linear(width, BYTES, bias=False)
        for p in self.parameters():
            nn.init.normal_(p, std=0.04)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[B, T]` bytes to logits `[B, T, BYTES]`."""
        x = norm(self.tokens(tokens) + self.places.weight[: tokens.shape[1]])
        for block in self.blocks:
            x = block(x)
        return F.linear(norm(x), F.normalize(self.head.weight, dim=-1, eps=1e-12))


def batches(size: int, steps: int) -> list[tuple[Tensor, Tensor]]:
    """Stretches of the standard library's source with some bytes hidden: `[size, CONTEXT]`, and as it was."""
    sources = sorted(Path(os.__file__).parent.glob("*.py"))[:40]
    text = bytes(b for p in sources for b in p.read_bytes() if b < BYTES)
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    starts = torch.randint(0, len(data) - CONTEXT, (steps, size, 1))
    whole = data[starts + torch.arange(CONTEXT)]
    hidden = torch.rand(whole.shape) < HIDDEN
    return list(zip(whole.masked_fill(hidden, MASK), whole.masked_fill(~hidden, -100), strict=True))


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of the hidden bytes, in nats."""
    tokens, targets = batch
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=-100)


def main() -> None:
    """Train, and show that the norm settles where the theory says, whatever it was at the start."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=1e-3)
    parser.add_argument(
        "--init-scale", type=float, default=1.0, help="multiplies all parameters at the start"
    )
    parser.add_argument("--run-dir", type=Path, default=Path("runs/sibert"))
    options = parser.parse_args()
    lr, decay = options.lr, options.weight_decay

    torch.manual_seed(0)
    model = Sibert()
    data = batches(16, options.steps)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(options.init_scale)
    print(em.probe_homogeneity(model, lambda m: m(data[0][0]), scales=(0.3, 3.0), groups={}))

    optimizer = torch.optim.SGD(model.parameters(), lr=lr, weight_decay=decay)
    monitor = em.EntropyMonitor(model, optimizer=optimizer, run_dir=options.run_dir, every=50, on_alert=print)
    squares: deque[float] = deque(maxlen=100)  # of gradients at unit norm
    losses: deque[float] = deque(maxlen=50)
    clips = 0
    for step, batch in enumerate(data):
        loss = loss_of(model, batch)
        loss.backward()
        norm_now = float(torch.stack([p.detach().norm() for p in model.parameters()]).norm())
        found = em.relative_global_clip_(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        monitor.step(loss)

        clips += int(found.clipped)
        squares.append(float(torch.minimum(found.norm, found.max_norm)) ** 2 * norm_now**2)
        losses.append(loss.item())
        if step % max(1, options.steps // 8) == 0 or step == options.steps - 1:
            settled = equilibrium_norm(lr, decay, (sum(squares) / len(squares)) ** 0.5)
            print(
                f"step {step:4}  loss {sum(losses) / len(losses):.3f}  norm {norm_now:7.2f} (equilibrium "
                f"{settled:5.2f})  effective learning rate {effective_learning_rate(lr, norm_now):.2e}  "
                f"clipped {clips}"
            )
    monitor.close()

    run = em.load_run(options.run_dir)
    print(run)
    print(run.heads.groupby("layer")[["attention", "entropy"]].agg(["first", "last"]))


if __name__ == "__main__":
    main()
