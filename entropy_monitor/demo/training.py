"""One training run of the demonstration, watched as any run would be."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from entropy_monitor.demo.digits import CLASSES, PATCH_SIZE, TOKENS, Digits
from entropy_monitor.demo.vit import VisionTransformer
from entropy_monitor.monitor import EntropyMonitor
from entropy_monitor.records import Alert, Sink
from entropy_monitor.remedies import param_groups, reinitialise, remove_layer_norms, sigma_reparam

BATCH = 128


@dataclass(frozen=True)
class Recipe:
    """How a run is trained: AdamW without weight decay, linear warmup, then a constant learning rate.

    Attributes:
        name: of the run and its directory.
        words: what is tried.
        learning_rate: after warmup.
        warmup: steps.
        cured: whether the model is treated by the recipe of Zhai et al. 2023 before it is trained: layer
            norms removed, weights drawn anew, σReparam on every linear layer.
    """

    name: str
    words: str
    learning_rate: float
    warmup: int
    cured: bool = False


RECIPES = (
    Recipe("sound", "learning rate 1e-3 after 50 warmup steps", 1e-3, 50),
    Recipe("too-fast", "learning rate 2e-2 at once, no warmup", 2e-2, 0),
    Recipe(
        "cured",
        "the same seed and learning rate, σReparam, weights drawn anew, no layer norms",
        2e-2,
        0,
        True,
    ),
)


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        accuracy: on the test images.
        loss: mean of the last ten steps.
        alerts: those that opened, in order.
        run_dir: where the run is kept.
    """

    accuracy: float
    loss: float
    alerts: tuple[Alert, ...]
    run_dir: Path


def train(
    recipe: Recipe,
    digits: Digits,
    run_dir: Path,
    *,
    steps: int = 500,
    seed: int = 0,
    depth: int = 6,
    batch_size: int = BATCH,
    loggers: Sequence[Sink] = (),
    on_alert: Callable[[Alert], object] | None = None,
    on_step: Callable[[int, float], object] | None = None,
) -> Outcome:
    """Train one recipe, watched.

    Args:
        recipe: how.
        digits: on what.
        run_dir: where the run is kept.
        steps: updates.
        seed: of weights and batches.
        depth: blocks of the model.
        batch_size: images of a batch.
        loggers: sinks beside the run directory.
        on_alert: see `EntropyMonitor`.
        on_step: told step and loss, for a progress display.
    """
    torch.manual_seed(seed)
    model = VisionTransformer(TOKENS, PATCH_SIZE, CLASSES, depth=depth)
    if recipe.cured:
        remove_layer_norms(model)
        reinitialise(model, std=0.02)
        with _told_already():
            sigma_reparam(model, gamma="one")
    groups = param_groups(model, recipe.learning_rate, gamma_lr=1.0)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / max(1, recipe.warmup))
    )
    losses: list[float] = []
    alerts: list[Alert] = []
    with EntropyMonitor(
        model, optimizer=optimizer, run_dir=run_dir, every=10, loggers=loggers, on_alert=on_alert
    ) as monitor:
        for step in range(steps):
            batch = torch.randint(0, len(digits.train_x), (batch_size,))
            loss = F.cross_entropy(model(digits.train_x[batch]), digits.train_y[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            report = monitor.step(loss, scalars={"learning_rate": schedule.get_last_lr()[0]})
            schedule.step()
            alerts += report.alerts
            losses.append(loss.item())
            if on_step is not None:
                on_step(step, losses[-1])
    return Outcome(_accuracy(model, digits), sum(losses[-10:]) / len(losses[-10:]), tuple(alerts), run_dir)


@contextmanager
def _told_already() -> Iterator[None]:
    """Weights that were drawn a line before compute nothing that could be lost."""
    logger = logging.getLogger("entropy_monitor")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@torch.no_grad()
def _accuracy(model: nn.Module, digits: Digits) -> float:
    model.eval()
    return float((model(digits.test_x).argmax(-1) == digits.test_y).float().mean())
