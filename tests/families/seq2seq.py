"""Encoder-decoders of `transformers`: self and cross attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.families.family import ALL, UNFLEXED, VOCAB, B, Call, add, heads_of, hugging_face, padding, tokens

D, H = 32, 4
TARGETS = 9


def texts() -> dict[str, Tensor]:
    return {
        "input_ids": tokens(),
        "attention_mask": padding(right=5),
        "decoder_input_ids": tokens(TARGETS, seed=1),
        "decoder_attention_mask": padding(right=3, t=TARGETS),
    }


def one_text() -> dict[str, Tensor]:
    """T5's own score_mod indexes its position bias, of one sequence, by the sequence: it takes no other."""
    return {name: x[-1:] for name, x in texts().items()}


def sounds() -> dict[str, Tensor]:
    features = torch.randn(B, 8, 24, generator=torch.Generator().manual_seed(0))
    return {"input_features": features, "decoder_input_ids": tokens(TARGETS)}


def _call(name: str, query: nn.Linear, key: nn.Linear) -> Call:
    return Call(name, heads_of(query.weight, H), heads_of(key.weight, H))


def t5(model: Any) -> list[Call]:
    found = []
    for side in ("encoder", "decoder"):
        for i, block in enumerate(getattr(model, side).block):
            a = block.layer[0].SelfAttention
            found.append(_call(f"{side}.block.{i}.layer.0.SelfAttention", a.q, a.k))
            if side == "decoder":
                a = block.layer[1].EncDecAttention
                found.append(_call(f"{side}.block.{i}.layer.1.EncDecAttention", a.q, a.k))
    return found


def bart(model: Any) -> list[Call]:
    found = []
    for side in ("encoder", "decoder"):
        for i, layer in enumerate(getattr(model, side).layers):
            for name in ("self_attn", "encoder_attn")[: 1 if side == "encoder" else 2]:
                a = getattr(layer, name)
                found.append(_call(f"{side}.layers.{i}.{name}", a.q_proj, a.k_proj))
    return found


IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
BOTH = {"d_model": D, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": H}
BOTH |= {"decoder_attention_heads": H, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": VOCAB}
DROPOUTS = ("dropout", "attention_dropout", "activation_dropout")
T5 = hugging_face(
    "T5Model",
    {"vocab_size": VOCAB, "d_model": D, "d_kv": 6, "d_ff": 48, "num_layers": 2, "num_heads": H}
    | {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    | {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12},
    ("dropout_rate",),
)
add("t5", T5, texts, t5, UNFLEXED, gain=0.9)
add("t5-one-sequence", T5, one_text, t5, ALL, gain=0.9)
add(
    "bart",
    hugging_face("BartModel", BOTH | IDS | {"max_position_embeddings": 64}, DROPOUTS),
    texts,
    bart,
    ALL,
)
add(
    "whisper",
    hugging_face(
        "WhisperModel",
        BOTH
        | IDS
        | {
            "num_mel_bins": 8,
            "max_source_positions": 12,
            "max_target_positions": 24,
            "apply_spec_augment": False,
        },
        DROPOUTS,
    ),
    sounds,
    bart,
    ALL,
)
