"""Ways to watch attention entropy in training, each around a model and optimizer of its own."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from cost_ours import Ours32, OursAll, OursAuto
from cost_plain import Plain, Setting
from models import Maps
from torch import Tensor

PEER = "torch-module-monitor"
PEER_MISSING = f"not installed: pip install --no-deps {PEER} h5py"


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
