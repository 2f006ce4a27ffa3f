"""Attention maps: whole ones for the user, pooled ones as evidence of an alert."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Literal, SupportsIndex

import torch
from torch import Tensor, nn

from entropy_monitor import measures
from entropy_monitor.errors import ConfigurationError
from entropy_monitor.hooks.calls import AttentionCall, Inputs, fused_factors
from entropy_monitor.hooks.names import module_names

EVIDENCE_SIZE = 64

Heads = Sequence[SupportsIndex] | Literal["all"]
MapChoice = bool | Sequence[str] | Mapping[str, Heads]


class WantedMaps:
    """Which layers' and heads' maps the user asked for.

    How many heads a layer has shows only in its forward, where nothing may raise: heads that it does not have
    are noted there, and raised by `check`.

    Args:
        choice: True for all, False for none, name patterns, or a dict from pattern to heads or "all".
        model: whose modules the patterns name.

    Raises:
        ConfigurationError: if `choice` is none of these, or a pattern names no module.
    """

    def __init__(self, choice: MapChoice, model: nn.Module) -> None:
        self._by_pattern = _by_pattern(choice)
        self._wrong: dict[str, str] = {}
        if not isinstance(choice, bool):
            check_patterns("maps", self._by_pattern, model)

    def of(self, layer: str, count: int) -> list[int] | str | None:
        """The heads to keep of a layer that has `count`: a list of them, "all", or None for none."""
        heads = next((h for pattern, h in self._by_pattern.items() if fnmatchcase(layer, pattern)), None)
        if heads is None:
            return None
        beyond = [] if isinstance(heads, str) else [h for h in heads if h >= count]
        if beyond:
            self._wrong[layer] = f"{layer} has {count} heads (0 to {count - 1}), and no head {beyond[0]}"
            return None
        return heads

    def check(self) -> None:
        """Raise ConfigurationError if a layer ran that lacks a head that was asked for."""
        if self._wrong:
            raise ConfigurationError(f"maps: {'; '.join(list(self._wrong.values())[:5])}")


def check_patterns(option: str, patterns: Collection[str], model: nn.Module) -> None:
    """Raise ConfigurationError unless every pattern names a module of the model."""
    names = list(module_names(model).values())
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            some = ", ".join(names[:8])
            raise ConfigurationError(
                f"{option}: no module is named {pattern!r}; {type(model).__name__} has {some}, …"
            )


def _by_pattern(choice: object) -> dict[str, list[int] | str]:
    if isinstance(choice, bool):
        return {"*": "all"} if choice else {}
    patterns = list(choice) if isinstance(choice, Collection) and not isinstance(choice, str) else [None]
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigurationError(
            "maps must be True, False, a list of layer name patterns, or a dict from pattern to heads, "
            f"got {choice!r}"
        )
    if isinstance(choice, Mapping):
        return {pattern: _heads(pattern, heads) for pattern, heads in choice.items()}
    return {str(pattern): "all" for pattern in patterns}


def _heads(pattern: str, heads: object) -> list[int] | str:
    if isinstance(heads, str) and heads == "all":
        return heads
    numbers = _numbers(heads)
    if numbers is None or any(n < 0 for n in numbers):
        raise ConfigurationError(
            f"maps[{pattern!r}] must be a list of heads, counted from 0, or 'all', got {heads!r}"
        )
    return numbers


def _numbers(heads: object) -> list[int] | None:
    if isinstance(heads, str) or not isinstance(heads, Iterable):
        return None
    try:
        return None if any(isinstance(h, bool) for h in heads) else [operator.index(h) for h in heads]
    except TypeError:  # something in it is no integer
        return None


@torch.no_grad()
def full_map(call: AttentionCall, heads: list[int] | None) -> Tensor:
    """`[B, H, T, S]`, float32: the attention of each head, before dropout.

    Args:
        call: the attention call.
        heads: which heads to keep; all by default.
    """
    if call.weights is not None:
        return _shares(call.weights if heads is None else call.weights[:, heads])
    if call.logits is not None:
        return _softmax(call.logits if heads is None else call.logits[:, heads])
    maps = _map(call, call.inputs, None).float()
    return maps if heads is None else maps[:, heads]


@torch.no_grad()
def evidence_map(call: AttentionCall) -> Tensor:
    """`[H, r, c]`, r, c ≤ 64: the first sequence's attention at evenly spaced rows, keys in blocks."""
    _, _, tokens = call.shape
    count = min(tokens, EVIDENCE_SIZE)
    rows = torch.arange(count, device=call.rows.device) * tokens // max(count, 1)
    if call.weights is not None:
        maps = _shares(call.weights[:1].index_select(2, rows))
    elif call.logits is not None:
        maps = _softmax(call.logits[:1].index_select(2, rows))
    else:
        maps = _map(call, _first_sequence(call.inputs), rows)
    return _pool_keys(maps[0])


def _softmax(logits: Tensor) -> Tensor:
    """Rows that see no key are 0, as in `measures.attention_map`."""
    blind = measures.hidden_logits(logits).all(-1, keepdim=True)
    return logits.float().softmax(-1).masked_fill(blind, 0.0)


def _shares(weights: Tensor) -> Tensor:
    """Rows divided by their sums; those of zeros alone stay 0."""
    weights = weights.float()
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total == 0, 1.0, total)


def _map(call: AttentionCall, inputs: Inputs | None, rows: Tensor | None) -> Tensor:
    if inputs is None:
        raise ValueError(f"attention call of {call.layer}: neither inputs nor logits")
    scale, softcap = fused_factors(inputs)
    return measures.attention_map(
        inputs.q,
        inputs.k,
        mask=inputs.mask,
        is_causal=inputs.is_causal,
        scale=scale,
        softcap=softcap,
        rows=rows,
        modify=inputs.modify,
    )


def _first_sequence(inputs: Inputs | None) -> Inputs | None:
    if inputs is None:
        return None
    mask = inputs.mask
    if mask is not None and mask.dim() == 4:
        mask = mask[:1]
    return replace(inputs, q=inputs.q[:1], k=inputs.k[:1], mask=mask)


def _pool_keys(maps: Tensor) -> Tensor:
    """Sum attention over equal blocks of keys, so that rows still sum to one."""
    keys = maps.shape[-1]
    if keys <= EVIDENCE_SIZE:
        return maps
    # Not by cumsum, which PyTorch refuses on CUDA where it is asked for determinism.
    borders = torch.arange(EVIDENCE_SIZE + 1, device=maps.device) * keys // EVIDENCE_SIZE
    places = borders[:-1, None] + torch.arange(-(-keys // EVIDENCE_SIZE), device=maps.device)
    taken = maps.index_select(-1, places.flatten().clamp(max=keys - 1)).view(*maps.shape[:-1], *places.shape)
    return torch.where(places < borders[1:, None], taken, 0.0).sum(-1)
