"""Decoders of `transformers`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from tests.families.family import UNFLEXED, VOCAB, Call, T, add, heads_of, hugging_face, padding, tokens

D, H, K = 32, 4, 2
SMALL = {"vocab_size": VOCAB, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": H}
SMALL |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}
GROUPED = SMALL | {"intermediate_size": 48, "num_key_value_heads": K}
DROPOUTS = ("attention_dropout",)


def left_padded() -> dict[str, Tensor]:
    """Rows of padding see no key at all."""
    return {"input_ids": tokens(), "attention_mask": padding(left=4)}


def right_padded() -> dict[str, Tensor]:
    """Rows of padding see the keys before them."""
    return {"input_ids": tokens(), "attention_mask": padding(right=5)}


def barely_padded() -> dict[str, Tensor]:
    """Every row sees a key, also within a window of 5.

    What a row that sees none puts out differs between implementations, and so do later layers then.
    """
    return {"input_ids": tokens(), "attention_mask": padding(right=4)}


def whole() -> dict[str, Tensor]:
    """No padding: a causal flag takes the place of a mask."""
    return {"input_ids": tokens()}


def separate(attention: str) -> Callable[[Any], list[Call]]:
    """Calls of layers with `q_proj` and `k_proj`; key heads are shared where there are fewer of them."""

    def calls(model: Any) -> list[Call]:
        found = []
        for i, layer in enumerate(model.layers):
            a = getattr(layer, attention)
            k = a.k_proj.weight.shape[0] * H // a.q_proj.weight.shape[0]
            found.append(
                Call(
                    f"layers.{i}.{attention}",
                    heads_of(a.q_proj.weight, H),
                    heads_of(a.k_proj.weight, k, H // k),
                )
            )
        return found

    return calls


def gpt2(model: Any) -> list[Call]:
    """Fused, transposed: `c_attn.weight` is `[D, 3D]`."""
    found = []
    for i, block in enumerate(model.h):
        q, k, _ = block.attn.c_attn.weight.detach().T.split(D)
        found.append(Call(f"h.{i}.attn", heads_of(q, H), heads_of(k, H)))
    return found


def neox(model: Any) -> list[Call]:
    """Fused, interleaved: `[H, 3, d, D]`."""
    found = []
    for i, layer in enumerate(model.layers):
        w = layer.attention.query_key_value.weight.detach().reshape(H, 3, D // H, D)
        q, k = (w[:, j].flatten(0, 1) for j in (0, 1))
        found.append(Call(f"layers.{i}.attention", heads_of(q, H), heads_of(k, H)))
    return found


def phi3(model: Any) -> list[Call]:
    """Fused: queries, keys, values one after the other."""
    found, d = [], D // H
    for i, layer in enumerate(model.layers):
        q, k, _ = layer.self_attn.qkv_proj.weight.detach().split([H * d, K * d, K * d])
        found.append(Call(f"layers.{i}.self_attn", heads_of(q, H), heads_of(k, K, H // K)))
    return found


def falcon(groups: int) -> Callable[[Any], list[Call]]:
    """Fused: each of the groups has its queries, one key, one value."""

    def calls(model: Any) -> list[Call]:
        found, d = [], D // H
        for i, block in enumerate(model.h):
            w = block.self_attention.query_key_value.weight.detach()
            w = w.reshape(groups, H // groups + 2, d, D)
            q, k = w[:, :-2].flatten(0, 2), w[:, -2].flatten(0, 1)
            found.append(Call(f"h.{i}.self_attention", heads_of(q, H), heads_of(k, groups, H // groups)))
        return found

    return calls


@contextmanager
def alibi_once() -> Iterator[None]:
    """Falcon's eager attention adds ALiBi twice, in its mask and to the logits; its fused one once."""
    from transformers.models.falcon import modeling_falcon

    build = modeling_falcon.build_alibi_tensor
    modeling_falcon.build_alibi_tensor = lambda *args, **kwargs: build(*args, **kwargs) / 2
    try:
        yield
    finally:
        modeling_falcon.build_alibi_tensor = build


add(
    "gpt2",
    hugging_face(
        "GPT2Model",
        {"vocab_size": VOCAB, "n_embd": D, "n_layer": 2, "n_head": H, "n_positions": 64}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        ("attn_pdrop", "resid_pdrop", "embd_pdrop"),
    ),
    right_padded,
    gpt2,
    UNFLEXED,
)
add(
    "gpt2-scaled-by-layer",
    hugging_face(
        "GPT2Model",
        {"vocab_size": VOCAB, "n_embd": D, "n_layer": 2, "n_head": H, "n_positions": 64}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        | {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
        ("attn_pdrop", "resid_pdrop", "embd_pdrop"),
    ),
    whole,
    gpt2,
    UNFLEXED,
    gain=2.0,
)
add(
    "gpt-neox",
    hugging_face(
        "GPTNeoXModel",
        SMALL | {"intermediate_size": 48, "rotary_pct": 0.5},
        ("attention_dropout", "hidden_dropout"),
    ),
    left_padded,
    neox,
)
add("llama", hugging_face("LlamaModel", GROUPED, DROPOUTS), left_padded, separate("self_attn"))
add("llama-unpadded", hugging_face("LlamaModel", GROUPED, DROPOUTS), whole, separate("self_attn"))
add(
    "mistral",
    hugging_face("MistralModel", GROUPED | {"sliding_window": 5}, DROPOUTS),
    right_padded,
    separate("self_attn"),
)
add(
    "qwen3",
    hugging_face("Qwen3Model", GROUPED | {"head_dim": 12}, DROPOUTS),
    left_padded,
    separate("self_attn"),
)
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
add(
    "gemma2",
    hugging_face(
        "Gemma2Model",
        GROUPED | ALTERNATING | {"head_dim": 12, "query_pre_attn_scalar": 5, "attn_logit_softcapping": 3.0},
        DROPOUTS,
    ),
    left_padded,
    separate("self_attn"),
    ("eager", "flex_attention"),
)
add(
    "gemma3",
    hugging_face(
        "Gemma3TextModel", GROUPED | ALTERNATING | {"head_dim": 12, "query_pre_attn_scalar": 5}, DROPOUTS
    ),
    barely_padded,
    separate("self_attn"),
)
add(
    "phi3",
    hugging_face("Phi3Model", GROUPED, ("attention_dropout", "resid_pdrop", "embd_pdrop")),
    left_padded,
    phi3,
)
FALCON = {n: v for n, v in SMALL.items() if n != "max_position_embeddings"}
FALCON_DROPOUTS = ("attention_dropout", "hidden_dropout")
add(
    "falcon-multi-query",
    hugging_face("FalconModel", FALCON | {"multi_query": True, "alibi": False}, FALCON_DROPOUTS),
    left_padded,
    falcon(1),
    UNFLEXED,
)
FALCON_ALIBI = hugging_face("FalconModel", FALCON | {"multi_query": False, "alibi": True}, FALCON_DROPOUTS)
add("falcon-alibi", FALCON_ALIBI, right_padded, falcon(H), ("eager",))
add("falcon-alibi-fused", FALCON_ALIBI, right_padded, falcon(H), ("sdpa",), within=alibi_once)
add(
    "falcon-new-decoder",
    hugging_face(
        "FalconModel",
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": K, "alibi": False},
        FALCON_DROPOUTS,
    ),
    left_padded,
    falcon(K),
    UNFLEXED,
)
add(
    "mixtral",
    hugging_face(
        "MixtralModel",
        GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
        DROPOUTS,
    ),
    right_padded,
    separate("self_attn"),
)
assert T > 6  # longer than the windows
