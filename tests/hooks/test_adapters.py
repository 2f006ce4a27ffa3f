"""Low-rank adapters: `W x + c · B A x` is the linear map `W + c · B A` where both see the same input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.hooks.test_projections_agree import HD, B, D, H, T, parts_of

peft = pytest.importorskip("peft", reason="adapters are peft's")


class Attention(nn.Module):
    """Separate projections."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(D, D) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).view(B, -1, H, HD).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return F.scaled_dot_product_attention(q * 0.5, k, v)


class Fused(nn.Module):
    """One projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(B, -1, 3, H, HD).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v)


class Model(nn.Module):
    """A block around the attention."""

    def __init__(self, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(D), attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(self.norm(x))


def adapted(attention: Callable[[], nn.Module], **options: object) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    targets = ["qkv"] if attention is Fused else ["q_proj", "k_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, **options)
    model = peft.inject_adapter_in_model(config, Model(attention))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    return model, torch.randn(B, T, D)


def whole(layer: nn.Module) -> Tensor:
    """The map that an adapted layer is, float64, read off what it makes of unit vectors."""
    layer = layer.double()
    unit = torch.eye(layer.in_features, dtype=torch.float64)
    with torch.no_grad():
        return (layer(unit) - layer(torch.zeros_like(unit))).T


def sigmas(weight: Tensor) -> list[float]:
    return torch.linalg.matrix_norm(weight.reshape(H, HD, D), 2).tolist()


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("attention", [Attention, Fused])
def test_the_sum_is_the_projection(attention: Callable[[], nn.Module], train: bool) -> None:
    model, x = adapted(attention)
    parts, figures = parts_of(model.train(train), x)
    assert parts.reasons == {}
    attn = model.attn
    if attention is Fused:
        q, k, _ = whole(attn.qkv).split(D)
    else:
        q, k = whole(attn.q_proj), whole(attn.k_proj)
    assert figures["sigma_q"] == pytest.approx(sigmas(q), rel=1e-5)
    assert figures["sigma_k"] == pytest.approx(sigmas(k), rel=1e-5)
    both = torch.linalg.matrix_norm(q.reshape(H, HD, D).mT @ k.reshape(H, HD, D), 2)
    assert figures["sigma_qk"] == pytest.approx(both.tolist(), rel=1e-5)


def test_two_adapters() -> None:
    model, x = adapted(Attention)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"])
    model = peft.inject_adapter_in_model(config, model, adapter_name="other")
    layer = model.attn.q_proj
    nn.init.normal_(layer.lora_B["other"].weight, std=0.3)
    layer.set_adapter(["default", "other"])
    parts, figures = parts_of(model.eval(), x)
    assert parts.reasons == {}
    assert figures["sigma_q"] == pytest.approx(sigmas(whole(layer)), rel=1e-5)


def test_merged() -> None:
    model, x = adapted(Attention)
    model.attn.q_proj.merge()
    parts, figures = parts_of(model.eval(), x)
    assert parts.reasons == {}
    assert figures["sigma_q"] == pytest.approx(sigmas(whole(model.attn.q_proj)), rel=1e-5)


@pytest.mark.parametrize("starts_at_zero", [False, True])
def test_dropout_before_an_adapter_makes_it_unknown(starts_at_zero: bool) -> None:
    model, x = adapted(Attention, lora_dropout=0.2)
    if starts_at_zero:
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.zeros_(p)
    parts, figures = parts_of(model.train(), x)
    assert all(v != v for name in ("sigma_q", "sigma_k", "sigma_qk") for v in figures[name])
    assert "different inputs" in parts.reasons["query"]
    parts, figures = parts_of(model.eval(), x)
    assert parts.reasons == {}
    assert figures["sigma_q"] == pytest.approx(sigmas(whole(model.attn.q_proj)), rel=1e-5)


def test_weights_of_other_adapters_are_never_told_wrong() -> None:
    """DoRA scales feature by feature: no sum of maps that is followed."""
    model, x = adapted(Attention, use_dora=True)
    parts, figures = parts_of(model.eval(), x)
    assert all(v != v for v in figures["sigma_q"])
    assert parts.reasons["query"].startswith("queries ")
