"""The flash paths of transformers, with a stand-in kernel, against its own eager attention."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig
from transformers import modeling_flash_attention_utils as utilities

import entropy_monitor as em
from tests.hooks.sources import flash_stand_in as stand_in

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "mistral, window": lambda: MistralConfig(**SIZES, sliding_window=4),
    "gemma 2, soft-cap and windows": lambda: Gemma2Config(
        **SIZES, sliding_window=4, attn_logit_softcapping=1.5, query_pre_attn_scalar=8
    ),
}


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make transformers believe that flash-attn is there, and load ours."""
    chosen = (
        "_loaded_implementation",
        "_flash_fn",
        "_flash_varlen_fn",
        "_flash_with_kvcache_fn",
        "_pad_fn",
        "_unpad_fn",
        "_process_flash_kwargs_fn",
        "_process_with_kvcache_kwargs_fn",
    )
    for name in chosen:
        monkeypatch.setattr(utilities, name, None)
    monkeypatch.setattr(utilities, "is_flash_attn_2_available", lambda *_: True)
    with stand_in.installed():
        yield


def both(config: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(0)
    eager = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    with torch.no_grad():
        for name, p in eager.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                p.mul_(20)
    flash = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    flash.load_state_dict(eager.state_dict())
    flash.config._attn_implementation = "flash_attention_2"
    return eager, flash


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("name", CONFIGS)
def test_as_eager(name: str, padding: str) -> None:
    eager, flash = both(CONFIGS[name]())
    tokens = torch.randint(0, 50, (3, 9))
    mask = torch.ones_like(tokens)
    if padding == "right":
        mask[1, 6:] = mask[2, 3:] = 0
    elif padding == "left":
        mask[1, :3] = mask[2, :6] = 0
    inputs = {"input_ids": tokens, "attention_mask": None if padding == "none" else mask, "use_cache": False}
    with torch.no_grad():
        out = flash(**inputs).logits
        torch.testing.assert_close(
            out[mask.bool()], eager(**inputs).logits[mask.bool()], rtol=1e-4, atol=1e-4
        )
        with em.capture(eager, rows="all", maps=True) as dense:
            eager(**inputs)
        with em.capture(flash, rows="all", maps=True) as seen:
            assert torch.equal(flash(**inputs).logits, out)
    assert list(seen.heads["layer"]) == list(dense.heads["layer"])
    assert set(seen.heads["call"]) == {0}
    for layer, (maps,) in dense.maps.items():
        # of the rows that are no padding: transformers' eager attention has padding see the first keys
        p = maps.double().transpose(1, 2)[mask.bool()]  # [rows, heads, keys]
        mine = seen.heads[seen.heads["layer"] == layer]
        entropy = torch.special.entr(p).sum(-1).mean(0)
        torch.testing.assert_close(
            torch.tensor(mine["entropy"].values).double(), entropy, rtol=1e-3, atol=1e-3
        )
        keys = (p[:, :1] > 0).sum(-1).double().log().mean()
        torch.testing.assert_close(
            torch.tensor(mine["max_entropy"].values).double(), keys.expand(4), rtol=1e-3, atol=1e-3
        )
        assert set(mine["rows_read"]) == {int(mask.sum())}
    sigmas = torch.tensor(seen.heads["sigma_qk"].values)
    torch.testing.assert_close(sigmas, torch.tensor(dense.heads["sigma_qk"].values), rtol=1e-4, atol=1e-4)


def test_documents_packed_in_one_sequence() -> None:
    eager, flash = both(LlamaConfig(**SIZES))
    tokens = torch.randint(0, 50, (1, 9))
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])
    own = places.eq(0).cumsum(-1)
    mask = (own[:, None, :, None] == own[:, None, None]) & torch.ones(9, 9).tril().bool()
    with torch.no_grad():
        with em.capture(eager, rows="all") as dense:
            eager(
                tokens,
                attention_mask=torch.where(mask, 0.0, -torch.inf),
                position_ids=places,
                use_cache=False,
            )
        with em.capture(flash, rows="all") as seen:
            flash(tokens, position_ids=places, use_cache=False)
    for name in ("entropy", "max_entropy", "max_logit", "sigma_qk", "rows_read"):
        torch.testing.assert_close(
            torch.tensor(seen.heads[name].values),
            torch.tensor(dense.heads[name].values),
            rtol=1e-3,
            atol=1e-3,
        )
