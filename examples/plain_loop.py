"""A byte-level language model on Python's own sources, watched in a plain PyTorch loop.

`python examples/plain_loop.py --steps 200`, then `entropy-monitor report runs/plain-loop`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import entropy_monitor as em

CONTEXT = 64


class LanguageModel(nn.Module):
    """nn.TransformerEncoder with a causal mask; nothing in it knows of the monitor."""

    def __init__(self, width: int = 64, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, width)
        self.places = nn.Embedding(CONTEXT, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.1, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.logits = nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[B, T]` bytes to logits `[B, T, 256]`."""
        t = tokens.shape[1]
        x = self.tokens(tokens) + self.places(torch.arange(t))
        mask = nn.Transformer.generate_square_subsequent_mask(t)
        return self.logits(self.encoder(x, mask=mask, is_causal=True))


def batches(size: int, steps: int) -> list[Tensor]:
    """Random stretches of the standard library's source, `[size, CONTEXT + 1]` each."""
    sources = sorted(Path(os.__file__).parent.glob("*.py"))[:40]
    data = torch.frombuffer(bytearray(b"".join(p.read_bytes() for p in sources)), dtype=torch.uint8).long()
    starts = torch.randint(0, len(data) - CONTEXT - 1, (steps, size))
    return [torch.stack([data[i : i + CONTEXT + 1] for i in row]) for row in starts]


def main() -> None:
    """Train, and show what the run left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/plain-loop"))
    options = parser.parse_args()

    torch.manual_seed(0)
    model = LanguageModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    monitor = em.EntropyMonitor(model, optimizer=optimizer, run_dir=options.run_dir, every=10, on_alert=print)
    for batch in batches(16, options.steps):
        logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.step(loss)
    monitor.close()

    run = em.load_run(options.run_dir)
    print(run)
    print(run.heads.groupby("layer")["entropy"].agg(["first", "last"]).round(3))


if __name__ == "__main__":
    main()
