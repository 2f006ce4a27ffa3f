"""Attention maps: whole ones for the user, pooled ones as evidence of an alert."""

from __future__ import annotations

import torch
from torch import Tensor

from entropy_monitor import measures
from entropy_monitor.hooks.calls import AttentionCall, Inputs

EVIDENCE_SIZE = 64


@torch.no_grad()
def full_map(call: AttentionCall, heads: list[int] | None) -> Tensor:
    """`[B, H, T, S]`, float32: the attention of each head, before dropout.

    Args:
        call: the attention call.
        heads: which heads to keep; all by default.
    """
    if call.logits is not None:
        return _softmax(call.logits if heads is None else call.logits[:, heads])
    maps = _map(call, call.inputs, None).float()
    return maps if heads is None else maps[:, heads]


@torch.no_grad()
def evidence_map(call: AttentionCall) -> Tensor:
    """`[H, r, c]`, r, c ≤ 64: the first sequence's attention at evenly spaced rows, keys in blocks."""
    _, _, tokens = call.shape
    rows = measures.systematic_rows(tokens, EVIDENCE_SIZE, 0, call.rows.device)
    if call.logits is not None:
        maps = _softmax(call.logits[:1].index_select(2, rows))
    else:
        maps = _map(call, _first_sequence(call.inputs), rows)
    return _pool_keys(maps[0])


def _softmax(logits: Tensor) -> Tensor:
    """Rows that see no key are 0, as in `measures.attention_map`."""
    blind = measures.hidden_logits(logits).all(-1, keepdim=True)
    return logits.float().softmax(-1).masked_fill(blind, 0.0)


def _map(call: AttentionCall, inputs: Inputs | None, rows: Tensor | None) -> Tensor:
    if inputs is None:
        raise ValueError(f"attention call of {call.layer}: neither inputs nor logits")
    if isinstance(inputs.scale, Tensor):
        raise TypeError(f"attention call of {call.layer}: fused attention has one scale, got a tensor")
    return measures.attention_map(
        inputs.q, inputs.k, mask=inputs.mask, is_causal=inputs.is_causal, scale=inputs.scale, rows=rows
    )


def _first_sequence(inputs: Inputs | None) -> Inputs | None:
    if inputs is None:
        return None
    mask = inputs.mask
    if mask is not None and mask.dim() == 4:
        mask = mask[:1]
    return Inputs(inputs.q[:1], inputs.k[:1], mask, inputs.is_causal, inputs.scale)


def _pool_keys(maps: Tensor) -> Tensor:
    """Sum attention over equal blocks of keys, so that rows still sum to one."""
    keys = maps.shape[-1]
    if keys <= EVIDENCE_SIZE:
        return maps
    block = torch.arange(keys, device=maps.device) * EVIDENCE_SIZE // keys
    pooled = maps.new_zeros(*maps.shape[:-1], EVIDENCE_SIZE)
    return pooled.index_add_(-1, block, maps)
