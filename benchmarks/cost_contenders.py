"""Ways to watch attention entropy in training, each around a model and optimizer of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from models import ByteModel, Maps, Shape, batch_of_text
from torch import Tensor
from torch.nn import functional as F

import entropy_monitor as em

IN_FULL = 4  # of ours, one measurement in so many
PEER = "torch-module-monitor"
PEER_MISSING = f"not installed: pip install --no-deps {PEER} h5py"


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
    read, `[steps, layers, heads]`, nats, float64; it ends the watching. `rows_read` is known from then on.
    """

    remark = ""
    beginning = 0  # measured steps that are not like the later ones

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
    def in_full(self) -> bool:
        """Whether the coming measured step reads more than others."""
        return False

    def measured(self) -> None:
        self.train()

    def between(self) -> None:
        self.train()

    def entropies(self) -> Tensor:
        return torch.stack(self.read)

    def close(self) -> None:
        """Leave nothing behind."""


def from_maps(maps: Maps) -> Tensor:
    """Mean entropy of each head, `[layers, heads]`, as it is commonly written."""
    with torch.no_grad():
        means = [-(a * (a + 1e-9).log()).sum(-1).mean((0, 2)) for a in maps]
        return torch.stack(means).double().cpu()


class EagerMaps(Plain):
    """The attention written out in the training itself, its maps returned (`output_attentions=True`)."""

    remark = "no fused kernel in any step"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.maps: Maps = []

    def forward(self, x: Tensor) -> Tensor:
        self.maps = []
        return self.run(x, self.maps)

    def measured(self) -> None:
        self.train(lambda _: self.read.append(from_maps(self.maps)))


class ExtraForward(Plain):
    """A second forward in eval mode without gradients, with the attention written out."""

    remark = "reads another forward than the one that trains"

    def measured(self) -> None:
        self.train(self._look)

    def _look(self, x: Tensor) -> None:
        maps: Maps = []
        self.model.eval()
        with torch.no_grad(), self.precision():
            self.model(x, maps)
        self.model.train()
        self.read.append(from_maps(maps))


class ModuleMonitor(Plain):
    """The PyPI package torch-module-monitor, called from the attention modules as its README says."""

    remark = "each attention module must call it in its own code"

    def __init__(self, setting: Setting) -> None:
        if find_spec("torch_module_monitor") is None:
            raise RuntimeError(PEER_MISSING)
        import torch_module_monitor as peer

        super().__init__(setting)
        self.monitor = peer.ModuleMonitor(monitor_step_fn=lambda step: step % setting.every == 0)
        self.monitor.set_module(self.model)
        self.names = [f"blocks.{i}.attn" for i in range(setting.shape.layers)]

        def observer(name: str) -> Callable[..., None]:
            def look(q: Tensor, k: Tensor, v: Tensor, y: Tensor) -> None:
                peer.monitor_scaled_dot_product_attention(
                    self.monitor, name, q, k, v, dropout_p=setting.dropout, is_causal=True, activation=y
                )

            return look

        for name in self.names:
            self.model.get_submodule(name).observers.append(observer(name))

    def train(self, before_update: Callable[[Tensor], None] | None = None) -> Tensor:
        step = self.steps
        self.monitor.begin_step(step)
        loss = super().train(before_update)
        self.monitor.end_step()
        return loss

    def measured(self) -> None:
        step = self.steps
        self.train()
        figures = self.monitor.storage.get_step_metrics(step)
        heads = range(self.setting.shape.heads)
        values = [[figures[f"attention_entropy/{name}.head_{h}"] for h in heads] for name in self.names]
        self.read.append(torch.tensor(values, dtype=torch.float64))


class Ours(Plain):
    """`EntropyMonitor` in the training itself."""

    beginning = 8

    @property
    def in_full(self) -> bool:
        return self.steps // self.setting.every % IN_FULL == 0

    def __init__(self, setting: Setting, rows: int | str) -> None:
        super().__init__(setting)
        self._folder = tempfile.TemporaryDirectory()
        self._run_dir = f"{self._folder.name}/run"
        self.monitor = em.EntropyMonitor(
            self.run, optimizer=self.optimizer, run_dir=self._run_dir, every=setting.every, rows=rows
        )

    def train(self, before_update: Callable[[Tensor], None] | None = None) -> Tensor:
        loss = super().train(before_update)
        self.monitor.step(loss)
        return loss

    def entropies(self) -> Tensor:
        self.monitor.close()
        heads = em.load_run(self._run_dir).heads.sort_values(["step", "layer_index", "head"])
        shape = self.setting.shape
        self.rows_read = int(heads["rows_read"].max()) // shape.batch
        return torch.from_numpy(heads["entropy"].to_numpy("float64")).view(-1, shape.layers, shape.heads)

    def close(self) -> None:
        self.monitor.close()
        self._folder.cleanup()


class Ours32(Ours):
    def __init__(self, setting: Setting) -> None:
        super().__init__(setting, 32)


class OursAuto(Ours):
    def __init__(self, setting: Setting) -> None:
        super().__init__(setting, "auto")


class OursAll(Ours):
    def __init__(self, setting: Setting) -> None:
        super().__init__(setting, "all")


BASE = "plain"
AGAIN = "plain again"
CONTENDERS: dict[str, type[Plain]] = {
    BASE: Plain,
    AGAIN: Plain,
    "attention written out, maps returned": EagerMaps,
    "extra forward with maps": ExtraForward,
    PEER: ModuleMonitor,
    "ours, rows=32": Ours32,
    'ours, rows="auto"': OursAuto,
    'ours, rows="all"': OursAll,
}


def why(error: BaseException) -> str:
    """An error in one line that fits into a table."""
    first = str(error).strip().splitlines()[:1]
    return f"{first[0] if first else type(error).__name__}"[:200].replace("|", "/")
