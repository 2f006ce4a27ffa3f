"""W_O: the first linear map of what attention gives, and of nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import entropy_monitor as em

D, H = 16, 2


class Attention(nn.Module):
    """Attention whose output takes a way of its own."""

    def __init__(self, by_hand: bool = False, way: str = "plain") -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.norm, self.gate, self.by_hand, self.way = nn.LayerNorm(D), nn.Linear(D, D), by_hand, way

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (H, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = (q @ k.mT / 8**0.5).softmax(-1) @ v if self.by_hand else F.scaled_dot_product_attention(q, k, v)
        y = y.transpose(1, 2).flatten(2)
        if self.way == "none":
            return y
        if self.way == "gated and normed":
            y = self.norm(y) * torch.sigmoid(self.gate(x))
        if self.way == "added to":
            return self.o(x + y)
        return self.o(y)


def sigma_o(model: nn.Module, run_dir: Path, compiled: bool = False) -> list[float]:
    x = torch.randn(2, 5, D)
    forward = torch.compile(model, backend="aot_eager") if compiled else model
    with em.EntropyMonitor(model, run_dir=run_dir, every=1) as monitor:
        forward(x).sum().backward()
        monitor.step()
    torch._dynamo.reset()
    return em.load_run(run_dir).layers.sigma_o.tolist()


def norm(weight: Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight.detach().double(), 2))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("way", ["plain", "gated and normed"])
def test_it_is_found(way: str, by_hand: bool, compiled: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Attention(by_hand, way)
    assert sigma_o(model, tmp_path / "run", compiled) == pytest.approx([norm(model.o.weight)], rel=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("by_hand", [False, True])
def test_a_map_of_something_else_is_none(by_hand: bool, compiled: bool, tmp_path: Path) -> None:
    found = sigma_o(Attention(by_hand, "added to"), tmp_path / "run", compiled)
    assert torch.tensor(found).isnan().all()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("by_hand", [False, True])
def test_the_next_attentions_projections_are_none(by_hand: bool, compiled: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Attention(by_hand, "none"), Attention(by_hand))
    first, second = sigma_o(model, tmp_path / "run", compiled)
    assert torch.tensor(first).isnan()
    assert second == pytest.approx(norm(model[1].o.weight), rel=1e-5)


def test_an_adapter_is_part_of_it(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = Attention()
    config = peft.LoraConfig(target_modules=["o"], r=2, lora_alpha=4, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    layer = model.o
    weight = layer.base_layer.weight + 2 * layer.lora_B.default.weight @ layer.lora_A.default.weight
    assert sigma_o(adapted, tmp_path / "run") == pytest.approx([norm(weight)], rel=1e-5)
