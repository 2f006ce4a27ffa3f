"""Decoders of `transformers` with latent attention."""

from __future__ import annotations

from typing import Any

import torch

from tests.families.decoders import DROPOUTS, SMALL, D, H, left_padded
from tests.families.family import Call, add, heads_of, hugging_face

NOPE, ROPE, VALUE, KV_RANK, Q_RANK = 6, 4, 7, 12, 10


def deepseek(model: Any) -> list[Call]:
    """Latent: W_Q,h = (W_qb,h W_qa)ᵀ; W_K,h = [(W_kvb,h W_kva)ᵀ, W_kropeᵀ]; norms in between left out."""
    found = []
    for i, layer in enumerate(model.layers):
        a = layer.self_attn
        if a.q_lora_rank is None:
            q = a.q_proj.weight.detach().double()
        else:
            q = a.q_b_proj.weight.detach().double() @ a.q_a_proj.weight.detach().double()
        latent, rope = a.kv_a_proj_with_mqa.weight.detach().double().split([KV_RANK, ROPE])
        nope = a.kv_b_proj.weight.detach().double().reshape(H, NOPE + VALUE, KV_RANK)[:, :NOPE] @ latent
        k = torch.cat([nope, rope.expand(H, ROPE, D)], 1)
        found.append(Call(f"layers.{i}.self_attn", heads_of(q, H), k.transpose(1, 2)))
    return found


DEEPSEEK = SMALL | {"intermediate_size": 48, "moe_intermediate_size": 16, "num_key_value_heads": H}
DEEPSEEK |= {"qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROPE, "v_head_dim": VALUE}
DEEPSEEK |= {"kv_lora_rank": KV_RANK, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2}
DEEPSEEK |= {"topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1}
for rank in (Q_RANK, None):
    add(
        "deepseek-v3" if rank else "deepseek-v3-full-queries",
        hugging_face("DeepseekV3Model", DEEPSEEK | {"q_lora_rank": rank}, DROPOUTS),
        left_padded,
        deepseek,
    )
