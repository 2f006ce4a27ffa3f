"""Theorem 3.1: how low attention entropy can be, given the norm of the logits (Zhai et al. 2023).

`B(σ, T) = log(1 + x) + δ x / (1 + x)` with `δ = σ √(T / (T - 1))`, `x = (T - 1) e^(-δ)`: no softmax
row over T keys whose logits have norm σ has less entropy. As softmax ignores a shift, the norm of
the *centred* logits will do.
"""

from __future__ import annotations

import math
from typing import overload

import torch
from torch import Tensor

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.measures._precision import working_dtype

_BISECTIONS = 80


@overload
def entropy_lower_bound(sigma: float, num_keys: float) -> float: ...
@overload
def entropy_lower_bound(sigma: Tensor, num_keys: Tensor | float) -> Tensor: ...
@overload
def entropy_lower_bound(sigma: Tensor | float, num_keys: Tensor) -> Tensor: ...
def entropy_lower_bound(sigma: Tensor | float, num_keys: Tensor | float) -> Tensor | float:
    """`B(σ, T)` in nats (Theorem 3.1).

    Strictly falling in σ from `B(0, T) = log T` towards 0, reached at σ = inf. It is 0 for one key
    and for none.

    Args:
        sigma: norm of the (centred) logits, from 0 to inf.
        num_keys: number of keys T.

    Returns:
        A float for floats (computed in float64); else a tensor of the broadcast shape in float32,
        or float64 when one of the tensors is. NaN where σ or T is NaN; in tensors also where σ < 0.

    Raises:
        ConfigurationError: if two floats are given and one is negative or NaN.
    """
    if not isinstance(sigma, Tensor) and not isinstance(num_keys, Tensor):
        _require_number("sigma", sigma)
        _require_number("num_keys", num_keys)
        if math.isinf(num_keys):
            return 0.0 if math.isinf(sigma) else math.inf
        return float(_bound(_double(sigma), _double(num_keys)))
    return _bound(*_tensors(sigma, num_keys))


@overload
def critical_sigma(entropy: float, num_keys: float) -> float: ...
@overload
def critical_sigma(entropy: Tensor, num_keys: Tensor | float) -> Tensor: ...
@overload
def critical_sigma(entropy: Tensor | float, num_keys: Tensor) -> Tensor: ...
def critical_sigma(entropy: Tensor | float, num_keys: Tensor | float) -> Tensor | float:
    """The smallest σ whose bound `B(σ, T)` has fallen to an entropy: Theorem 3.1 inverted.

    0 where `entropy ≥ log T`, which includes rows of one key or none; inf where entropy ≤ 0 and T >
    1, since no finite σ permits it. By bisection in float64.

    Args:
        entropy: nats.
        num_keys: number of keys T.

    Returns:
        A float for floats; else a tensor of the broadcast shape in float32, or float64 when one of
        the tensors is. NaN where an argument is NaN.

    Raises:
        ConfigurationError: if two floats are given and one is negative or NaN.
    """
    if not isinstance(entropy, Tensor) and not isinstance(num_keys, Tensor):
        _require_number("entropy", entropy)
        _require_number("num_keys", num_keys)
        return float(_inverse(_double(entropy), _double(num_keys)))
    target, n = _tensors(entropy, num_keys)
    if target.device.type == "mps":  # knows no float64
        return _inverse(target, n)
    return _inverse(target.double(), n.double()).to(target.dtype)


def minimising_logits(sigma: float, num_keys: int) -> Tensor:
    """The logits of norm σ whose softmax has entropy `B(σ, T)` exactly (Theorem 3.1 is tight).

    One logit is `σ√(1 - 1/T)`, the rest are `-σ√(1 / (T (T - 1)))`.

    Returns:
        `[T]`, float64, on the CPU; their sum is 0. A single logit is 0, whatever σ.

    Raises:
        ConfigurationError: if σ is negative or NaN, or there is no key.
    """
    _require_number("sigma", sigma)
    if num_keys < 1:
        raise ConfigurationError(f"num_keys must be at least 1, got {num_keys}")
    if num_keys == 1:
        return torch.zeros(1, dtype=torch.float64, device="cpu")
    rest = -sigma * math.sqrt(1 / (num_keys * (num_keys - 1)))
    logits = torch.full((num_keys,), rest, dtype=torch.float64, device="cpu")
    logits[0] = sigma * math.sqrt(1 - 1 / num_keys)
    return logits


@torch.no_grad()
def _bound(sigma: Tensor, n: Tensor) -> Tensor:
    others = (n - 1).clamp(min=0)
    several = n > 1
    delta = sigma * (n / torch.where(several, others, 1.0)).sqrt()
    # e^(log(T-1) - δ) rather than (T-1) e^(-δ): the factor underflows long before the product does.
    x = (others.log() - delta).exp()
    tail = torch.where(x > 0, delta * (x / (1 + x)), 0.0)  # inf · 0
    bound = torch.where(several, x.log1p() + tail, 0.0)
    return torch.where((sigma >= 0) & ~n.isnan(), bound, math.nan)


@torch.no_grad()
def _inverse(entropy: Tensor, n: Tensor) -> Tensor:
    entropy, n = torch.broadcast_tensors(entropy, n)  # type: ignore[no-untyped-call]
    # B(σ) ≤ (1 + δ) (T-1) e^(-δ), which is below the entropy at δ = 2 log((T-1) / entropy) + 10.
    low = torch.zeros_like(entropy)
    high = 2 * ((n - 1).clamp(min=1).log() - entropy.clamp(min=1e-300).log()).clamp(min=0) + 10
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        above = _bound(middle, n) > entropy
        low = torch.where(above, middle, low)
        high = torch.where(above, high, middle)
    sigma = torch.where(entropy > 0, high, math.inf)
    sigma = torch.where((n <= 1) | (entropy >= n.clamp(min=1).log()), 0.0, sigma)
    return torch.where(entropy.isnan() | n.isnan(), math.nan, sigma)


def _double(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device="cpu")


def _tensors(first: Tensor | float, second: Tensor | float) -> tuple[Tensor, Tensor]:
    """Both as tensors of the working dtype, on the device of the one that is a tensor."""
    given = [x for x in (first, second) if isinstance(x, Tensor)]
    dtype = working_dtype(*given)
    a, b = (
        x.to(dtype) if isinstance(x, Tensor) else given[0].new_full((), x, dtype=dtype)
        for x in (first, second)
    )
    return a, b


def _require_number(name: str, value: float) -> None:
    if not value >= 0:
        raise ConfigurationError(f"{name} must be 0 or more, got {value}")
