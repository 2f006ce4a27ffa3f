"""The core of QK-clip: weights of queries and keys are scaled in place, head by head."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.hooks.storage import storage_of
from entropy_monitor.measures._precision import working_dtype


def qk_clip_(
    query: Tensor,
    key: Tensor | None,
    factors: Tensor,
    *,
    query_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    balance: float = 0.5,
) -> None:
    """Scale the weights of queries and keys in place, so that each head's logits shrink by its factor.

    A factor η is split into η^balance for the query and the rest for the key (QK-Clip of Kimi K2, arXiv
    2507.20534: √η each). Where query heads share a key head, its factor is the largest that they would give
    it, and each query takes what is left of its own η: nothing is ever scaled up, and every head gets
    exactly its η.

    Args:
        query: `[H, d_model, d_head]`, float, views of the parameters, as in `Projections`.
        key: `[K, d_model, d_head]`, K dividing H: query head h shares key head `h // (H / K)`; None leaves
            the keys alone, and the queries take all of η.
        factors: η of each query head, `[H]`, in (0, 1]; 1 changes nothing.
        query_bias: `[H, d_head]`, or None.
        key_bias: `[K, d_head]`, or None.
        balance: share of the query, in [0, 1].

    Raises:
        ConfigurationError: if shapes do not fit, a number is out of its range, or two of the tensors share
            memory, so that some weights would be scaled twice. Nothing is written.
    """
    check_balance(balance)
    parts = {"query": query, "key": key, "query_bias": query_bias, "key_bias": key_bias}
    given = {name: part for name, part in parts.items() if part is not None}
    _check_weights(given)
    heads, shared = query.shape[0], 0 if key is None else key.shape[0]
    _check_factors(factors, heads)
    _check_memory(given)
    of_query, of_key = split_factors(factors, shared, balance)
    for name, part in given.items():
        scale_heads_(part, of_query if name.startswith("query") else of_key)


def split_factors(factors: Tensor, key_heads: int, balance: float) -> tuple[Tensor, Tensor]:
    """Factors of queries `[H]` and keys `[K]`, float64, whose products are the factors of the logits.

    Args:
        factors: of the logits of each query head, `[H]`, at most 1.
        key_heads: K; 0 where keys stay.
        balance: share of the query.
    """
    factors = factors.detach().double().cpu()
    if key_heads == 0:
        return factors, factors.new_ones(0)
    grouped = factors.view(key_heads, -1)
    of_key = grouped.amax(1) ** (1 - balance)
    return (grouped / of_key[:, None]).flatten(), of_key


@torch.no_grad()
def scale_heads_(part: Tensor, factors: Tensor) -> None:
    """Multiply what belongs to each head by its factor, in place.

    Args:
        part: weights or biases, of which the leading dimensions count the heads.
        factors: of the shape of these dimensions, float64.
    """
    dtype = working_dtype(part)
    factors = factors.view(*factors.shape, *[1] * (part.dim() - factors.dim())).to(part.device, dtype)
    part.copy_(part.to(dtype) * factors)  # rounded once, whatever the dtype of the weights


def check_balance(balance: object) -> None:
    """Raise ConfigurationError unless this is a number from 0 to 1."""
    fits = isinstance(balance, (int, float)) and not isinstance(balance, bool)
    if not fits or not 0 <= float(balance) <= 1:  # type: ignore[arg-type]
        raise ConfigurationError(
            f"QK-clip: balance is the queries' share of a factor, a number from 0 to 1, got {balance!r}"
        )


def _check_weights(given: dict[str, Tensor]) -> None:
    for name, part in given.items():
        if not isinstance(part, Tensor) or not part.is_floating_point():
            got = part.dtype if isinstance(part, Tensor) else type(part).__name__
            raise ConfigurationError(f"qk_clip_: {name} must be a floating-point tensor, got {got}")
    if "query" not in given:
        raise ConfigurationError("qk_clip_: query must be a tensor [H, d_model, d_head], got None")
    for name in ("query", "key"):
        if name in given and given[name].dim() != 3:
            raise ConfigurationError(
                f"qk_clip_: {name} must be [heads, d_model, d_head], got shape {tuple(given[name].shape)}"
            )
    heads, _, size = given["query"].shape
    if "key" in given:
        shared, _, key_size = given["key"].shape
        if shared == 0 or heads % shared:
            raise ConfigurationError(
                f"qk_clip_: the number of key heads must divide that of query heads, got {shared} and {heads}"
            )
        if key_size != size:
            raise ConfigurationError(
                f"qk_clip_: query and key must have the same d_head, got {size} and {key_size}"
            )
    elif "key_bias" in given:
        raise ConfigurationError("qk_clip_: key_bias without key; None leaves the keys alone, biases too")
    for name in ("query", "key"):
        bias = given.get(f"{name}_bias")
        if bias is not None and bias.shape != (given[name].shape[0], size):
            raise ConfigurationError(
                f"qk_clip_: {name}_bias must be [heads, d_head], ({given[name].shape[0]}, {size}) for this "
                f"{name}, got shape {tuple(bias.shape)}"
            )


def _check_factors(factors: object, heads: int) -> None:
    wanted = f"qk_clip_: factors must be {heads} numbers in (0, 1], one for each query head, got "
    if not isinstance(factors, Tensor):
        raise ConfigurationError(f"{wanted}{type(factors).__name__}; give a tensor of shape ({heads},)")
    if factors.shape != (heads,):
        raise ConfigurationError(f"{wanted}shape {tuple(factors.shape)}")
    if not bool(((factors > 0) & (factors <= 1)).all()):
        raise ConfigurationError(f"{wanted}{factors.tolist()}")


def _check_memory(given: dict[str, Tensor]) -> None:
    for name, part in given.items():
        if any(step == 0 and size > 1 for step, size in zip(part.stride(), part.shape, strict=True)):
            raise ConfigurationError(
                f"qk_clip_: {name} is expanded: several of its entries are one number in memory. Give each "
                "head once; keys that query heads share are [K, d_model, d_head] with K < H"
            )
    for (name, part), (other, more) in combinations(given.items(), 2):
        if _overlap(part, more):
            raise ConfigurationError(
                f"qk_clip_: {name} and {other} share memory, and would be scaled twice. Where queries and "
                "keys are made by the same weights, QK-clip cannot scale them one by one"
            )


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether a number belongs to both; parts of one fused weight may interleave without that."""
    memory = storage_of(a)
    if memory is None or memory != storage_of(b) or 0 in (a.numel(), b.numel()):
        return a is b
    if a.dtype != b.dtype:
        return True
    first, last = max(_first(a), _first(b)), min(_last(a), _last(b))
    if first > last:
        return False
    start = min(_first(a), _first(b))
    marks = torch.zeros(max(_last(a), _last(b)) - start + 1, dtype=torch.bool, device=a.device)
    marks.as_strided(a.shape, a.stride(), _first(a) - start).fill_(True)
    return bool(marks.as_strided(b.shape, b.stride(), _first(b) - start).any())


def _first(part: Tensor) -> int:
    return int(part.storage_offset())


def _last(part: Tensor) -> int:
    steps = zip(part.shape, part.stride(), strict=True)
    return _first(part) + sum((size - 1) * step for size, step in steps)
