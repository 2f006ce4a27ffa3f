"""The ways in which a model is compiled and trained, and one training of each."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

from entropy_monitor import EntropyMonitor
from tests.compiled.models import (
    CLASSES,
    TOKENS,
    WIDTH,
    BesideFunction,
    BreakBetween,
    ByHand,
    Capped,
    Cored,
    Encoded,
    Normed,
    Odd,
    Shaped,
    VectorMapped,
    built,
    frozen,
    tied,
)
from tests.training import ListSink

STEPS = 5
EVERY = 2

Forward = Callable[[Tensor], Tensor]
Compile = Callable[..., Callable[[nn.Module], Forward]]


@dataclass(frozen=True)
class Mode:
    """How a training is run.

    Attributes:
        compiled: makes of a model what is called.
        model: builds it.
        optimizer: of the parameters.
        autocast: dtype, None for none.
        scaler: scale the loss.
        accumulate: micro-batches of a step.
        tokens: of each step's sequences.
        evaluate: with and without gradients, after each step.
        tolerance: of figures against the same training in eager mode.
        same_training: whether eager training draws the same random numbers and computes the same gradients.
        breaks: whether Dynamo counts graph breaks.
        unknown: figures that are null: their projections ran in another graph than the attention.
        slow: takes long to compile.
    """

    compiled: Callable[[nn.Module], Forward]
    model: Callable[[], nn.Module] = field(default_factory=built)
    optimizer: Callable[[Any], torch.optim.Optimizer] = lambda p: torch.optim.SGD(p, 0.05, momentum=0.9)
    autocast: torch.dtype | None = None
    scaler: bool = False
    accumulate: int = 1
    tokens: Callable[[int], int] = lambda step: TOKENS
    evaluate: bool = False
    tolerance: float = 1e-4
    same_training: bool = True
    breaks: bool = False
    unknown: tuple[str, ...] = ()
    slow: bool = False


def whole(
    backend: str = "aot_eager", fullgraph: bool = True, **options: Any
) -> Callable[[nn.Module], Forward]:
    """The whole model."""
    return lambda model: torch.compile(model, backend=backend, fullgraph=fullgraph, **options)


def in_place(
    backend: str = "aot_eager", fullgraph: bool = True, **options: Any
) -> Callable[[nn.Module], Forward]:
    """The whole model, which stays what it is."""

    def compiled(model: nn.Module) -> Forward:
        model.compile(backend=backend, fullgraph=fullgraph, **options)
        return model

    return compiled


def each(
    part: str = "", backend: str = "aot_eager", fullgraph: bool = True, **options: Any
) -> Callable[[nn.Module], Forward]:
    """Every block in place, or a part of every block."""

    def compiled(model: nn.Module) -> Forward:
        for block in model.blocks:
            block.get_submodule(part).compile(backend=backend, fullgraph=fullgraph, **options)
        return model

    return compiled


def wrapped_blocks(model: nn.Module) -> Forward:
    """Every block in `torch.compile`."""
    model.blocks = nn.ModuleList(torch.compile(b, backend="aot_eager", fullgraph=True) for b in model.blocks)
    return model


def function(model: nn.Module) -> Forward:
    """A function that calls the model."""
    return torch.compile(lambda x: model(x), backend="eager", fullgraph=True)


def method(part: str = "") -> Callable[[nn.Module], Forward]:
    """The forward of the model or of a part of every block, put in place of the old one."""

    def compiled(model: nn.Module) -> Forward:
        for module in [block.get_submodule(part) for block in model.blocks] if part else [model]:
            module.forward = torch.compile(module.forward, backend="eager", fullgraph=True)
        return model

    return compiled


def function_within(model: nn.Module) -> Forward:
    """A function of q, k and v that an eager model calls."""
    core = torch.compile(_core, backend="eager", fullgraph=True)
    for block in model.blocks:
        block.attn.core = Plain(core)
    return model


def _core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Plain(nn.Module):
    """Calls a function."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.function(q, k, v)


def around(model: nn.Module) -> Forward:
    """The compiled model in a checkpoint."""
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    return lambda x: torch.utils.checkpoint.checkpoint(compiled, x, use_reentrant=False)


def eager(model: nn.Module) -> Forward:
    """As it is."""
    return model


BF16 = {"autocast": torch.bfloat16, "tolerance": 2e-2}  # bf16 resolves 2^-8 of a logit of a few units
DROPOUT = {"dropout": 0.1}
OF_QUERIES = ("sigma_q", "sigma_qk", "floor_weights", "floor_paper", "grad_linf", "grad_l2")
OF_QUERIES += ("update_sigma", "update_entropy")
OF_PROJECTIONS = (*OF_QUERIES, "sigma_k", "sigma_v")

MODES = {
    "whole": Mode(whole(), built(**DROPOUT)),
    "whole, backend eager": Mode(whole("eager"), built(**DROPOUT)),
    "whole, by hand": Mode(whole(), built(ByHand, **DROPOUT)),
    "attention in place, inductor": Mode(each("attn", "inductor")),
    "whole, inductor": Mode(whole("inductor"), slow=True),
    "in place": Mode(in_place(), built(**DROPOUT), slow=True),
    "blocks in place": Mode(each(), built(**DROPOUT)),
    "blocks in place, inductor": Mode(each(backend="inductor"), built(Capped), slow=True),
    "blocks wrapped": Mode(wrapped_blocks, slow=True),
    "attention in place": Mode(each("attn", "eager"), slow=True),
    "attention without parameters in place": Mode(each("attn.core", "eager"), built(Cored)),
    "function": Mode(function),
    "function within an eager model": Mode(function_within, built(Cored)),
    "forward replaced": Mode(method()),
    "attention's forward replaced": Mode(method("attn")),
    "dynamic": Mode(whole("eager", dynamic=True), tokens=lambda step: TOKENS + step),
    "lengths change": Mode(whole(), tokens=lambda step: TOKENS + step, slow=True),
    "lengths change, one graph each": Mode(whole("eager", dynamic=False), tokens=lambda i: TOKENS + i % 3),
    "breaks in attention": Mode(
        whole("eager", fullgraph=False), built(BreakBetween), breaks=True, unknown=OF_QUERIES
    ),
    "breaks in attention, blocks": Mode(
        each("", "eager", False), built(BreakBetween), breaks=True, unknown=OF_QUERIES, slow=True
    ),
    # Dynamo leaves a loop with a break in it to Python, and counts none.
    "breaks between blocks": Mode(whole("eager", fullgraph=False), built(breaks=True)),
    "breaks before attention, no self": Mode(
        whole("eager", fullgraph=False), built(Odd), breaks=True, unknown=OF_PROJECTIONS
    ),
    "checkpointing within": Mode(whole(), built(checkpointing="plain", **DROPOUT)),
    "checkpointing around blocks": Mode(each(), built(checkpointing="plain", **DROPOUT), slow=True),
    "checkpointing, reentrant, around blocks": Mode(each(), built(checkpointing="reentrant", **DROPOUT)),
    "checkpointing, selective": Mode(whole(), built(checkpointing="selective"), slow=True),
    "checkpointing, selective, around blocks": Mode(each(), built(checkpointing="selective"), slow=True),
    "checkpointing around all": Mode(around, slow=True),
    "bf16 autocast": Mode(whole(), **BF16),
    "bf16 autocast, inductor": Mode(each(backend="inductor"), built(Capped), **BF16, slow=True),
    "fp16 autocast, scaler": Mode(whole(), autocast=torch.float16, scaler=True, tolerance=4e-3, slow=True),
    "accumulation": Mode(whole("eager"), accumulate=3),
    "frozen parts": Mode(whole("eager"), frozen),
    "frozen encoder without gradients": Mode(whole(), Encoded, slow=True),
    "frozen encoder without gradients, in parts": Mode(
        lambda m: (m.encoder.compile(backend="eager"), m.net.compile(backend="eager"), m)[-1], Encoded
    ),
    "weights tied": Mode(each("", "eager"), tied),
    "one block, several times": Mode(whole("eager"), built(layers=1, times=3)),
    "one block in place, several times": Mode(each(), built(layers=1, times=3), slow=True),
    "many blocks": Mode(each("", "eager"), built(layers=12)),
    "many shapes": Mode(each("", "eager", dynamic=False), Shaped, slow=True),
    "batch norm": Mode(whole(), Normed, slow=True),
    "evaluation between": Mode(whole("eager"), built(**DROPOUT), evaluate=True, accumulate=2),
    "evaluation between, in place": Mode(in_place("eager"), built(**DROPOUT), evaluate=True, slow=True),
    "vmap and functional gradients": Mode(whole("eager"), built(VectorMapped)),
    "autograd function beside": Mode(whole(), built(BesideFunction), slow=True),
    "inductor, dropout": Mode(whole("inductor"), built(**DROPOUT), same_training=False, slow=True),
    "inductor, by hand, dropout": Mode(
        whole("inductor"), built(ByHand, **DROPOUT), same_training=False, slow=True
    ),
    "inductor, lengths change": Mode(whole("inductor"), tokens=lambda step: TOKENS + step, slow=True),
    "inductor, checkpointing within": Mode(whole("inductor"), built(checkpointing="plain"), slow=True),
    "reduce-overhead": Mode(whole("inductor", mode="reduce-overhead"), slow=True),
    "max-autotune-no-cudagraphs": Mode(whole("inductor", mode="max-autotune-no-cudagraphs"), slow=True),
}


@dataclass
class Trained:
    """All that a training leaves.

    Attributes:
        left: losses, gradients, parameters and so on, to be compared to the bit.
        heads: table of the monitor, if there was one.
        layers: likewise.
        graphs: that Dynamo had captured after each step.
        breaks: why graphs broke, and how often.
        faults: of the monitor.
    """

    left: dict[str, Any]
    heads: pd.DataFrame
    layers: pd.DataFrame
    graphs: list[int]
    breaks: dict[str, int]
    faults: dict[str, int]


def train(mode: Mode, run_dir: Path | None = None, steps: int = STEPS) -> Trained:
    """Run a training, watched where there is a directory for it."""
    torch.compiler.reset()
    counters.clear()
    torch.manual_seed(0)
    model = mode.model()
    optimizer = mode.optimizer([p for p in model.parameters() if p.requires_grad])
    scaler = torch.amp.GradScaler("cpu", enabled=mode.scaler, init_scale=64.0)
    sink = ListSink()
    forward = mode.compiled(model)
    monitor = None
    if run_dir is not None:
        monitor = EntropyMonitor(
            model, optimizer=optimizer, run_dir=run_dir, every=EVERY, rows=4, loggers=[sink]
        )
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002  the global state is what is compared
    torch.manual_seed(3)
    generator = torch.Generator().manual_seed(1)
    losses, gradients, evaluations, graphs = [], [], [], []
    for step in range(steps):
        optimizer.zero_grad()
        for _ in range(mode.accumulate):
            x = torch.randn(2, mode.tokens(step), WIDTH, generator=generator).requires_grad_()
            y = torch.randint(0, CLASSES, (2,), generator=generator)
            with _autocast(mode):
                loss = F.cross_entropy(forward(x).float(), y)
            scaler.scale(loss).backward()
            losses.append(loss.detach().clone())
        gradients += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        scaler.step(optimizer)
        scaler.update()
        if mode.evaluate:
            model.eval()
            with torch.no_grad():
                evaluations.append(forward(x).clone())
            evaluations.append(forward(x).detach().clone())
            model.train()
        if monitor is not None:
            monitor.step(loss)
        graphs.append(counters["stats"]["unique_graphs"])
    faults: dict[str, int] = {}
    if monitor is not None:
        monitor.close()
        faults = monitor.faults
    left = {
        "losses": losses,
        "gradients": gradients,
        "evaluations": evaluations,
        "parameters": [p.detach().clone() for p in model.parameters()],
        "buffers": [b.clone() for b in model.buffers()],
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()),  # noqa: NPY002
    }
    return Trained(left, *_tables(sink), graphs, dict(counters["graph_break"]), faults)


def in_eager_mode(mode: Mode) -> Mode:
    """The same training, not compiled."""
    return replace(mode, compiled=eager)


def _autocast(mode: Mode) -> contextlib.AbstractContextManager[Any]:
    if mode.autocast is None:
        return contextlib.nullcontext()
    return torch.autocast("cpu", mode.autocast)


def _tables(sink: ListSink) -> tuple[pd.DataFrame, pd.DataFrame]:
    heads = [pd.DataFrame(r.heads) for r in sink.records]
    layers = [pd.DataFrame(r.layers) for r in sink.records]
    return (pd.concat(heads), pd.concat(layers)) if heads else (pd.DataFrame(), pd.DataFrame())
