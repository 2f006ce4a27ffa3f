"""Adapters in unusual places: beside a `Conv1D`, and beside attention rather than in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import entropy_monitor as em
from entropy_monitor.hooks.structure import unseen_attention
from tests.families.family import randomise
from tests.odd_models import KernelAttention
from tests.training import TOKENS, WIDTH, SeparateAttention
from tests.zoo.dense import heads_of

D, H = 32, 4
OF_WEIGHTS = ("sigma_q", "sigma_k", "sigma_qk")


@pytest.fixture(scope="module")
def peft() -> Any:
    return pytest.importorskip("peft", reason="adapters are peft's")


def adapted_gpt2(peft: Any, way: str, **options: Any) -> Any:
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50,
        n_embd=D,
        n_layer=2,
        n_head=H,
        n_positions=16,
        attn_pdrop=0,
        embd_pdrop=0,
        resid_pdrop=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2Model._from_config(config, attn_implementation=way)
    randomise(model, 1.6)
    lora = peft.LoraConfig(r=3, lora_alpha=6, fan_in_fan_out=True, init_lora_weights=False, **options)
    return peft.inject_adapter_in_model(lora, model)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("way", ["eager", "sdpa"])
def test_an_adapter_beside_a_conv1d(way: str, train: bool, peft: Any) -> None:
    """`Conv1D` flattens its input before the product, the adapter beside it does not: the input is one."""
    model = adapted_gpt2(peft, way, target_modules=["c_attn"]).train(train)
    ids = torch.randint(50, (2, 7))
    with em.capture(model) as seen, torch.no_grad():
        model(input_ids=ids)
    table = seen.heads
    assert seen.faults == {}
    for i, block in enumerate(model.h):
        c_attn = block.attn.c_attn
        factors = c_attn.lora_B.default.weight.double() @ c_attn.lora_A.default.weight.double()
        q, k, _ = (c_attn.base_layer.weight.double().T + 2 * factors).split(D)
        w_q, w_k = heads_of(q, H), heads_of(k, H)
        rows = table[table.layer == f"h.{i}.attn"]
        for name, want in (("sigma_q", w_q), ("sigma_k", w_k), ("sigma_qk", w_k @ w_q.mT)):
            norms = torch.linalg.matrix_norm(want, 2)
            torch.testing.assert_close(torch.tensor(rows[name].to_numpy()).double(), norms, rtol=1e-5, atol=0)
        assert (rows["floor_weights"] <= rows["entropy"] + 1e-5).all()
        assert rows["floor_weights"].notna().all()


def test_an_adapter_of_another_input_beside_a_conv1d_makes_it_unknown(peft: Any) -> None:
    model = adapted_gpt2(peft, "sdpa", target_modules=["c_attn"], lora_dropout=0.3).train()
    with em.capture(model) as seen, torch.no_grad():
        model(input_ids=torch.randint(50, (2, 7)))
    assert seen.heads[list(OF_WEIGHTS)].isna().all().all()
    assert "different inputs" in str(seen.describe())


class Block(nn.Module):
    """Attention, and a linear layer after it."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = SeparateAttention(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.attn(x))


@pytest.mark.parametrize("kind", ["LoraConfig", "IA3Config", "LoHaConfig"])
def test_adapters_beside_attention_are_not_taken_for_it(
    kind: str, peft: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """The code of peft's layers speaks of attention, whatever it is that they adapt."""
    options: dict[str, Any] = {"target_modules": ["mlp"]}
    options |= {"feedforward_modules": []} if kind == "IA3Config" else {"r": 2}
    block: Any = Block()
    model = peft.inject_adapter_in_model(getattr(peft, kind)(**options), block)
    assert hasattr(model.mlp, "base_layer")
    assert unseen_attention(model, ["attn"]) == []
    assert unseen_attention(model, []) == ["attn"]
    with em.EntropyMonitor(model, run_dir=tmp_path, every=1) as monitor:
        model(torch.randn(2, TOKENS, WIDTH)).sum().backward()
        assert monitor.step().measured
    assert monitor.describe().not_covered == ()
    assert caplog.records == []


class Adapted(nn.Module):
    """An adapter around anything."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.attention_scale = layer, nn.Parameter(torch.ones(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x)


def test_attention_within_an_adapter_is_still_missed() -> None:
    """The adapter is no more than what it is around; what it is around is asked for by itself."""
    model = nn.ModuleDict({"kernel": Adapted(KernelAttention()), "plain": Adapted(nn.Linear(4, 4))})
    assert unseen_attention(model, []) == ["kernel.base_layer"]
