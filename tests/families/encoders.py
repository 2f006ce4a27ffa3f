"""Encoders of `transformers`: texts and images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.families.family import ALL, UNFLEXED, VOCAB, B, Call, add, heads_of, hugging_face, padding, tokens

D, H = 32, 4
SMALL = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": H, "intermediate_size": 48}
TEXT = SMALL | {"vocab_size": VOCAB, "max_position_embeddings": 64, "pad_token_id": 0}
DROPOUTS = ("attention_probs_dropout_prob", "hidden_dropout_prob")


def padded() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "attention_mask": padding(right=5)}


def whole() -> dict[str, Tensor]:
    return {"input_ids": tokens()}


def image(size: int) -> Callable[[], dict[str, Tensor]]:
    def inputs() -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(B, 3, size, size, generator=torch.Generator().manual_seed(0))}

    return inputs


def named(layers: str, attention: str, query: str, key: str) -> Callable[[Any], list[Call]]:
    """Calls of layers with a query and a key projection of those names."""

    def calls(model: Any) -> list[Call]:
        found = []
        for i in range(2):
            name = f"{layers}.{i}.{attention}"
            q, k = (model.get_submodule(f"{name}.{part}").weight for part in (query, key))
            found.append(Call(name, heads_of(q, H), heads_of(k, H)))
        return found

    return calls


def modernbert(model: Any) -> list[Call]:
    """Fused: queries, keys, values one after the other."""
    found = []
    for i, layer in enumerate(model.layers):
        q, k, _ = layer.attn.Wqkv.weight.detach().split(D)
        found.append(Call(f"layers.{i}.attn", heads_of(q, H), heads_of(k, H)))
    return found


def swin(model: Any) -> list[Call]:
    """Two stages of two blocks; the second has twice the width and heads."""
    found = []
    for stage, heads in enumerate((2, 4)):
        for i in range(2):
            name = f"encoder.layers.{stage}.blocks.{i}.attention"
            a = model.get_submodule(name)
            found.append(Call(name, heads_of(a.q_proj.weight, heads), heads_of(a.k_proj.weight, heads)))
    return found


bert = named("encoder.layer", "attention.self", "query", "key")
add("bert", hugging_face("BertModel", TEXT, DROPOUTS), padded, bert, ALL)
add("bert-unpadded", hugging_face("BertModel", TEXT, DROPOUTS), whole, bert, ALL)
add("roberta", hugging_face("RobertaModel", TEXT, DROPOUTS), padded, bert, ALL)
DISENTANGLED = {"relative_attention": True, "max_relative_positions": 8, "position_biased_input": False}
add(
    "deberta-v2",
    hugging_face("DebertaV2Model", TEXT | DISENTANGLED | {"pos_att_type": ["c2p", "p2c"]}, DROPOUTS),
    padded,
    named("encoder.layer", "attention.self", "query_proj", "key_proj"),
    ("eager",),
)
add(
    "deberta-v2-shared-buckets",
    hugging_face(
        "DebertaV2Model",
        TEXT | DISENTANGLED | {"pos_att_type": ["p2c", "c2p"], "share_att_key": True, "position_buckets": 4},
        DROPOUTS,
    ),
    padded,
    named("encoder.layer", "attention.self", "query_proj", "key_proj"),
    ("eager",),
)
add(
    "modernbert",
    hugging_face(
        "ModernBertModel",
        TEXT
        | {"layer_types": ["full_attention", "sliding_attention"], "local_attention": 6}
        | {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
        ("attention_dropout", "mlp_dropout", "embedding_dropout"),
    ),
    padded,
    modernbert,
    ALL,
)
add(
    "vit",
    hugging_face("ViTModel", SMALL | {"image_size": 16, "patch_size": 4}, DROPOUTS),
    image(16),
    named("layers", "attention", "q_proj", "k_proj"),
    ALL,
)
add(
    "swin",
    hugging_face(
        "SwinModel",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
        | {"window_size": 4, "drop_path_rate": 0.0},
        DROPOUTS,
    ),
    image(32),
    swin,
    UNFLEXED,
)
