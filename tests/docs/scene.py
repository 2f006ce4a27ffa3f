"""What the code of a page finds: the reader's model, data and runs, as small as can be."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import entropy_monitor as em
from entropy_monitor.monitor import _open as open_monitors

WIDTH, HEADS, TOKENS, BATCHES = 8, 2, 6, 20

Names = dict[str, Any]


class Output(NamedTuple):
    """What the model returns."""

    loss: Tensor


class MyAttention(nn.Module):
    """Four linear layers around a fused attention function."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mixer(nn.Module):
    """Tokens mixed by learned weights: a softmax that is no product of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(1, 1, TOKENS, TOKENS))

    def forward(self, x: Tensor) -> Tensor:
        return (self.logits.expand(len(x), -1, -1, -1).softmax(-1) @ x[:, None])[:, 0]


class Block(nn.Module):
    def __init__(self, part: str, of: type[nn.Module]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.add_module(part, of())
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.get_submodule(self.part)(self.norm(x))
        return out


class Model(nn.Module):
    """Says whether a sequence has a positive mean."""

    def __init__(self, part: str = "attn", of: type[nn.Module] = MyAttention) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(part, of) for _ in range(2))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, batch: Tensor) -> Output:
        x = batch
        for block in self.blocks:
            x = block(x)
        logits = self.head(x.mean(1))[:, 0]
        return Output(F.binary_cross_entropy_with_logits(logits, (batch.mean((1, 2)) > 0).float()))


def tiny(part: str = "attn", of: type[nn.Module] = MyAttention, lr: float = 1e-2) -> Names:
    """A model, its optimizer and its data."""
    torch.manual_seed(0)
    model = Model(part, of)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    loader = torch.randn(BATCHES, 4, TOKENS, WIDTH).unbind()
    return {
        "model": model,
        "optimizer": optimizer,
        "loader": loader,
        "batch": loader[0],
        "MyAttention": MyAttention,
    }


def scheduled() -> Names:
    """The same, and a learning rate that changes."""
    made = tiny()
    return {**made, "scheduler": torch.optim.lr_scheduler.ConstantLR(made["optimizer"])}


def huggingface() -> Names:
    """A GPT-2 and its data."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=2, n_head=2))
    rows = torch.randint(0, 32, (16, 8))
    return {"model": model, "data": [{"input_ids": row, "labels": row} for row in rows]}


def lightning() -> Names:
    """A module around the model."""
    import lightning as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            loss: Tensor = self.model(batch).loss
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    torch.manual_seed(0)
    data = torch.utils.data.DataLoader(torch.randn(80, TOKENS, WIDTH), batch_size=4)
    return {"module": Module(), "loader": data}


def accelerate() -> Names:
    """The model with a loader that can be prepared."""
    data = torch.utils.data.DataLoader(torch.randn(80, TOKENS, WIDTH), batch_size=4)
    return {**tiny(), "loader": data}


SCENES: Mapping[str, Callable[[], Names]] = {
    "tiny": tiny,
    "recorded": tiny,
    "scheduled": scheduled,
    "mixer": partial(tiny, "mixer", Mixer),
    "distributed": tiny,
    "huggingface": huggingface,
    "lightning": lightning,
    "accelerate": accelerate,
}


def names(scene: str, recorded: Path) -> Names:
    """What the code finds at the beginning of a scene; monitors that an earlier one left are closed.

    Args:
        scene: which.
        recorded: runs that the scene of that name finds in the folder `runs`.
    """
    for monitor in list(open_monitors):
        monitor.close()
    if scene == "recorded":
        shutil.rmtree("runs", ignore_errors=True)
        shutil.copytree(recorded, "runs")
    if scene == "distributed":
        as_launched()
    return {"em": em, "torch": torch, "np": np, **SCENES[scene]()}


def record_runs(folder: Path) -> None:
    """Runs `a` and `b` below a folder: a sound one, and one whose learning rate is far too high."""
    for name, lr in (("a", 1e-2), ("b", 30.0)):
        made = tiny(lr=lr)
        model, optimizer = made["model"], made["optimizer"]
        with em.EntropyMonitor(model, optimizer=optimizer, run_dir=folder / name, every=1) as monitor:
            for batch in made["loader"]:
                loss = model(batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                monitor.step(loss)


def as_launched() -> None:
    """What torchrun would tell the first process of one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK="0", WORLD_SIZE="1")


@contextmanager
def place(folder: Path) -> Iterator[None]:
    """Work in a folder; leave nothing open, and the process as it was."""
    (folder / "my_package").mkdir()
    (folder / "my_package" / "my_module.py").write_text(
        "import torch\n\n"
        "from tests.docs.scene import TOKENS, WIDTH, Model\n\n\n"
        "def build():\n"
        "    return Model(), torch.randn(4, TOKENS, WIDTH)\n",
        "utf-8",
    )
    before, compile_ = dict(os.environ), torch.compile
    torch.compile = partial(compile_, backend="eager")  # type: ignore[assignment]  the default needs minutes
    try:
        yield
    finally:
        torch.compile = compile_
        os.environ.clear()
        os.environ.update(before)
        for monitor in list(open_monitors):
            monitor.close()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if "accelerate" in sys.modules:
            from accelerate.state import AcceleratorState, GradientState, PartialState

            for state in (AcceleratorState, GradientState, PartialState):
                state._reset_state()
