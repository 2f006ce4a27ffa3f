"""What reading some of the rows costs in precision, and whether the error bars tell it, on trained models.

`python benchmarks/error_bars.py` (about 15 minutes on two cores; `--smoke` in seconds). Byte-level causal
GPTs and an encoder with padding learn Python's own standard library, Vision Transformers the digits, one
pixel a token; one GPT and one of these at a learning rate at which attention collapses. At some steps of the
training the entropies of all rows are kept, and read as the monitor would: the rows of successive measured
steps, each with other sequences. All in nats, over heads and steps:

- spread: how far batches of that size differ in a head's mean entropy, all rows read (rms);
- error: of the mean over the rows read (rms); `strides` with rows in equal strides instead;
- se/error: rms standard error over rms error;
- 68 %, 95 %: how often ± 1 and ± 1.96 standard errors hold; errors below 1e-4 nats count as held;
- fine: share of heads whose rms error is at most a third of their spread.

The last table is by head: `peaked` are those with less than a quarter of the greatest possible entropy.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from entropy_monitor.demo.vit import VisionTransformer
from entropy_monitor.measures.sampling import stratified_rows, stratified_standard_error

ROUNDING = 1e-4  # nats
COUNTS, BATCHES = (16, 32, 64, 128), (1, 2, 4, 8)


@dataclass(frozen=True)
class Rows:
    """Entropies of all rows `[N, H, T]` of N sequences, and which are valid `[N, 1, T]`."""

    entropy: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Kind:
    """A model and how it is trained."""

    steps: int
    batch: int
    rate: float
    warmup: int = 30
    tokens: int = 256
    causal: bool = True
    sequences: int = 96


KINDS = {
    "GPT 256": Kind(300, 4, 3e-3),
    "GPT 256, too fast": Kind(150, 4, 3e-2, warmup=0),
    "GPT 1024": Kind(300, 1, 3e-3, tokens=1024, sequences=48),
    "encoder 256, padded": Kind(500, 4, 3e-3, causal=False),
    "ViT 64": Kind(300, 64, 1e-3, tokens=64, causal=False, sequences=256),
    "ViT 64, too fast": Kind(200, 64, 2e-2, warmup=0, tokens=64, causal=False, sequences=256),
}


class Attention(nn.Module):
    """Self-attention with rotary positions."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(turned(q), turned(k), v, attn_mask=mask, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(b, t, d))


class Bytes(nn.Module):
    """Logits of bytes; byte 256 stands for a hidden one."""

    def __init__(self, causal: bool, width: int = 64, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(257, width), nn.Linear(width, 256)
        self.attentions = nn.ModuleList(Attention(width, heads, causal) for _ in range(depth))
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
            )
            for _ in range(depth)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth + 1))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        for attention, mlp, norm in zip(self.attentions, self.mlps, self.norms, strict=False):
            x = x + attention(norm(x), mask)
            x = x + mlp(x)
        return self.head(self.norms[-1](x))


def turned(x: Tensor) -> Tensor:
    """Rotary embedding of the positions."""
    t, d = x.shape[-2:]
    angle = torch.arange(t)[:, None] * 1000.0 ** (-torch.arange(d // 2) / (d // 2))
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


@contextlib.contextmanager
def all_rows(found: list[Tensor]) -> Iterator[None]:
    """Keeps the entropy of every row of every attention call, `[B, H, T]`."""
    fused = F.scaled_dot_product_attention

    def read(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        logits = q @ k.mT / math.sqrt(q.shape[-1])
        if is_causal:
            logits = logits.masked_fill(torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
        if attn_mask is not None:
            logits = logits.masked_fill(~attn_mask, -math.inf)
        share = logits.softmax(-1)
        found.append(-torch.xlogy(share, share).sum(-1))
        return fused(q, k, v, attn_mask=attn_mask, is_causal=is_causal)

    F.scaled_dot_product_attention = read
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused


@torch.no_grad()
def entropies(forward: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`[N, heads of all layers, T]` of these sequences, a few at a time."""
    parts = []
    for few in zip(*(x.split(4) for x in inputs), strict=True):
        found: list[Tensor] = []
        with all_rows(found):
            forward(*few)
        parts.append(torch.cat(found, 1))
    return torch.cat(parts)


class Language:
    """Next bytes, or hidden ones in sequences that are padded."""

    def __init__(self, kind: Kind, sequences: int) -> None:
        sources = sorted(Path(os.__file__).parent.glob("*.py"))
        self.data = torch.tensor(bytearray(b"".join(path.read_bytes() for path in sources))).long()
        self.kind, self.model = kind, Bytes(kind.causal)
        self.kept = self.drawn(sequences)

    def drawn(self, count: int) -> tuple[Tensor, Tensor]:
        """Sequences `[count, T + 1]`, and which of their places are valid `[count, T]`."""
        tokens = self.kind.tokens
        begin = torch.randint(len(self.data) - tokens - 1, (count, 1))
        length = torch.full((count, 1), tokens)
        if not self.kind.causal:
            length = torch.randint(tokens // 4, tokens + 1, (count, 1))
        return self.data[begin + torch.arange(tokens + 1)], torch.arange(tokens) < length

    def mask(self, valid: Tensor) -> Tensor | None:
        """`[B, 1, T, T]`: padding is not seen, and sees everything, for a row of no key is NaN."""
        return None if self.kind.causal else valid[:, None, None, :] | ~valid[:, None, :, None]

    def loss(self) -> Tensor:
        ids, valid = self.drawn(self.kind.batch)
        if self.kind.causal:
            return F.cross_entropy(self.model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        ids = ids[:, :-1]
        hidden = (torch.rand(ids.shape) < 0.15) & valid
        return F.cross_entropy(
            self.model(ids.masked_fill(hidden, 256), self.mask(valid))[hidden], ids[hidden]
        )

    def look(self) -> Rows:
        ids, valid = self.kept
        read = entropies(lambda x, v: self.model(x, self.mask(v)), ids[:, :-1], valid)
        return Rows(read, valid[:, None].float())


class Vision:
    """Digits, one pixel a token."""

    def __init__(self, kind: Kind, sequences: int) -> None:
        from sklearn import datasets

        images, classes = datasets.load_digits(return_X_y=True)
        x = torch.tensor(images, dtype=torch.float32).view(-1, 64, 1)
        self.x, self.y = (x - x.mean()) / x.std(), torch.tensor(classes)
        self.kind, self.model, self.kept = kind, VisionTransformer(64, 1, 10, depth=4), self.x[-sequences:]

    def loss(self) -> Tensor:
        batch = torch.randint(0, 1437, (self.kind.batch,))
        return F.cross_entropy(self.model(self.x[batch]), self.y[batch])

    def look(self) -> Rows:
        return Rows(entropies(self.model, self.kept), torch.ones(len(self.kept), 1, 64))


def trained(name: str, kind: Kind, shorten: int) -> Iterator[tuple[int, Rows]]:
    """Trains; gives all rows of the same sequences before, early and at the end."""
    torch.manual_seed(0)
    task = (Vision if name.startswith("ViT") else Language)(kind, max(12, kind.sequences // shorten))
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=kind.rate, weight_decay=0.0)
    steps = kind.steps // shorten
    for step in range(steps + 1):
        if step in (0, steps // 5, steps):
            yield step, task.look()
        for group in optimizer.param_groups:
            group["lr"] = kind.rate * min(1.0, (step + 1) / max(1, kind.warmup))
        optimizer.zero_grad()
        task.loss().backward()
        optimizer.step()


@dataclass(frozen=True)
class Outcome:
    """What sampling did, `[trials, H]` each: errors, standard errors, errors of equal strides, full means."""

    error: Tensor
    se: Tensor
    strides: Tensor
    full: Tensor

    def spread(self) -> Tensor:
        return self.full.std(0)

    def held(self, deviations: float) -> float:
        return (self.error.abs() <= (deviations * self.se).clamp(min=ROUNDING)).float().mean().item()

    def fine(self) -> float:
        return (rms(self.error, 0) <= (self.spread() / 3).clamp(min=ROUNDING)).float().mean().item()


def rms(x: Tensor, dim: int | None = None) -> Tensor:
    return x.square().mean(dim).sqrt()


def mean(y: Tensor, weight: Tensor) -> Tensor:
    """Over sequences and valid rows, `[H]`."""
    return (weight * y).sum((0, 2)) / weight.expand_as(y).sum((0, 2))


def sampled(rows: Rows, count: int, batch: int, trials: int) -> Outcome:
    """As the monitor would read successive measured steps, each with other sequences."""
    draw = torch.Generator().manual_seed(1)
    N, _, T = rows.entropy.shape
    found = []
    for trial in range(trials):
        chosen = torch.randint(N, (batch,), generator=draw)
        y, w = rows.entropy[chosen], rows.weight[chosen]
        full = mean(y, w)
        places = stratified_rows(T, count, 10 * trial)
        strides = (torch.arange(count) * T + int(torch.randint(T, (), generator=draw))) // count
        read, valid = y[..., places], w[..., places]
        se = stratified_standard_error(read, valid, T)
        found.append([mean(read, valid) - full, se, mean(y[..., strides], w[..., strides]) - full, full])
    return Outcome(*(torch.stack(x) for x in zip(*found, strict=True)))


def line(name: str, outcomes: list[Outcome]) -> str:
    """A row of a table: figures over several outcomes."""
    error, se = (torch.cat([getattr(o, which).flatten() for o in outcomes]) for which in ("error", "se"))
    strides = torch.cat([o.strides.flatten() for o in outcomes])
    spread = torch.stack([rms(o.spread()) for o in outcomes])
    share = [
        sum(f(o) for o in outcomes) / len(outcomes)
        for f in (lambda o: o.held(1), lambda o: o.held(1.96), Outcome.fine)
    ]
    return (
        f"{name:28} {rms(spread):8.4f} {rms(strides):8.4f} {rms(error):8.4f} {rms(se) / rms(error):9.2f}"
        f" {share[0]:7.1%} {share[1]:7.1%} {share[2]:6.0%}"
    )


HEADER = (
    f"{'':28} {'spread':>8} {'strides':>8} {'error':>8} {'se/error':>9} {'68 %':>7} {'95 %':>7} {'fine':>6}"
)


def peaked(name: str, rows: Rows) -> Iterator[str]:
    """Heads with a quarter of the greatest entropy or less, apart from the others."""
    T = rows.entropy.shape[-1]
    greatest = torch.full((T,), math.log(T)) if "GPT" not in name else torch.arange(1.0, T + 1).log()
    low = mean(rows.entropy, rows.weight) < 0.25 * (greatest * rows.weight).sum() / rows.weight.sum()
    for word, which in (("peaked", low), ("other", ~low)):
        if which.any():
            part = Rows(rows.entropy[:, which], rows.weight)
            yield line(f"{name}: {int(which.sum())} {word}", [sampled(part, 32, 4, 100)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="a few steps and trials of everything")
    parser.add_argument("--trials", type=int, default=150, help="measured steps of each kind")
    options = parser.parse_args()
    shorten, trials = (50, 5) if options.smoke else (1, options.trials)
    found: dict[tuple[str, int, int], list[Outcome]] = {}
    by_head = []
    for name, kind in KINDS.items():
        for step, rows in trained(name, kind, shorten):
            print(f"{name}, step {step}: mean entropy {rms(mean(rows.entropy, rows.weight)):.3f}", flush=True)
            for count in COUNTS:
                for batch in BATCHES:
                    if count < kind.tokens and step:
                        found.setdefault((name, count, batch), []).append(sampled(rows, count, batch, trials))
        by_head += list(peaked(name, rows))
    for title, place, values in (("model", 0, KINDS), ("rows", 1, COUNTS), ("batch", 2, BATCHES)):
        print(f"\n{HEADER}")
        for value in values:
            print(
                line(
                    f"{title} {value}", [o for key, os_ in found.items() if key[place] == value for o in os_]
                )
            )
    print(line("all", [o for os_ in found.values() for o in os_]))
    for count in COUNTS:
        print(f"\n{HEADER}")
        for (name, c, batch), outcomes in found.items():
            if c == count:
                print(line(f"{name}, {c} × {batch}", outcomes))
    print(f"\n{HEADER}", *by_head, sep="\n")


if __name__ == "__main__":
    main()
