"""SGD with weight decay on a scale-invariant loss: true step size, and where norms settle (Li et al. 2022).

A loss with `L(c x) = L(x)` has gradients orthogonal to x (Euler), of norm `‖∇L(x̄)‖ / ‖x‖` with `x̄ = x / ‖x‖`.
What moves the direction x̄ is therefore η/‖x‖². A step `x ← (1 - ηλ) x - η ∇L(x)` gives

    ‖x'‖² = (1 - ηλ)² ‖x‖² + η² σ² / ‖x‖²,    σ = ‖∇L(x̄)‖

and stands still at `‖x‖⁴ = η σ² / (λ (2 - ηλ))`, where `‖∇L(x)‖ = √(λ (2 - ηλ) / η) ‖x‖`. The slides write
`√(2η / (λ (2 - ηλ))) σ` for `‖x‖²`; the 2 in its numerator is stray: their second formula, which is the one
above, and simulation agree on `√(η / (λ (2 - ηλ))) σ`.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import overload

import torch
from torch import Tensor

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.measures._precision import working_dtype


@overload
def effective_learning_rate(lr: float, norm: float) -> float: ...
@overload
def effective_learning_rate(lr: Tensor, norm: Tensor | float) -> Tensor: ...
@overload
def effective_learning_rate(lr: Tensor | float, norm: Tensor) -> Tensor: ...
def effective_learning_rate(lr: Tensor | float, norm: Tensor | float) -> Tensor | float:
    """`η / ‖x‖²`: the learning rate that the direction of scale-invariant parameters sees (Li et al. 2022).

    Args:
        lr: learning rate η, 0 or more.
        norm: `‖x‖₂` of the parameters (not squared), above 0.

    Returns:
        A float for floats; else a tensor of the broadcast shape in float32, or float64 when one of the
        tensors is: inf where the norm is 0, NaN where an argument is NaN or negative.

    Raises:
        ConfigurationError: if an argument is no real number, or two floats are given that are out of range.
    """
    _require_numbers(lr=lr, norm=norm)
    if not isinstance(lr, Tensor) and not isinstance(norm, Tensor):
        _require("lr", lr, zero=True)
        _require("norm", norm, zero=False)
        return float(lr) / float(norm) / float(norm)
    eta, n = _tensors(lr, norm)
    return torch.where((eta >= 0) & (n >= 0), eta / n / n, math.nan)


@overload
def equilibrium_norm(lr: float, weight_decay: float, gradient_norm: float) -> float: ...
@overload
def equilibrium_norm(lr: Tensor, weight_decay: Tensor | float, gradient_norm: Tensor | float) -> Tensor: ...
@overload
def equilibrium_norm(lr: Tensor | float, weight_decay: Tensor, gradient_norm: Tensor | float) -> Tensor: ...
@overload
def equilibrium_norm(lr: Tensor | float, weight_decay: Tensor | float, gradient_norm: Tensor) -> Tensor: ...
def equilibrium_norm(
    lr: Tensor | float, weight_decay: Tensor | float, gradient_norm: Tensor | float
) -> Tensor | float:
    """`‖x‖₂ = (η σ² / (λ (2 - ηλ)))^(1/4)`: where the norm settles under SGD with weight decay.

    From the recursion above; `x ← (1 - ηλ) x - η g` is what `torch.optim.SGD` does without momentum. It takes
    about `1 / (4ηλ)` steps to come e times nearer. The norm to which parameters fall from above shrinks by
    `1 - ηλ` a step; from below it rises faster.

    Args:
        lr: learning rate η, 0 or more.
        weight_decay: λ, above 0, with `ηλ < 2`.
        gradient_norm: `σ = ‖∇L(x̄)‖₂` at unit norm: a gradient's norm times `‖x‖₂`, root mean square over
            batches, since σ² is what enters.

    Returns:
        A float for floats (computed in float64); else a tensor of the broadcast shape in float32, or float64
        when one of the tensors is: NaN where there is no equilibrium.

    Raises:
        ConfigurationError: if an argument is no real number, or three floats are given that are out of range.
    """
    _require_numbers(lr=lr, weight_decay=weight_decay, gradient_norm=gradient_norm)
    given = (lr, weight_decay, gradient_norm)
    if not any(isinstance(value, Tensor) for value in given):
        lr, weight_decay, gradient_norm = (float(value) for value in given)
        _require_equilibrium(lr, weight_decay)
        _require("gradient_norm", gradient_norm, zero=True)
        return math.sqrt(gradient_norm) * math.sqrt(math.sqrt(lr / (weight_decay * (2 - lr * weight_decay))))
    eta, decay, sigma = _tensors(*given)
    norm: Tensor = sigma.sqrt() * (eta / (decay * (2 - eta * decay))) ** 0.25
    return torch.where(_has_equilibrium(eta, decay), norm, math.nan)


@overload
def equilibrium_gradient_norm(lr: float, weight_decay: float, norm: float) -> float: ...
@overload
def equilibrium_gradient_norm(lr: Tensor, weight_decay: Tensor | float, norm: Tensor | float) -> Tensor: ...
@overload
def equilibrium_gradient_norm(lr: Tensor | float, weight_decay: Tensor, norm: Tensor | float) -> Tensor: ...
@overload
def equilibrium_gradient_norm(lr: Tensor | float, weight_decay: Tensor | float, norm: Tensor) -> Tensor: ...
def equilibrium_gradient_norm(
    lr: Tensor | float, weight_decay: Tensor | float, norm: Tensor | float
) -> Tensor | float:
    """`‖∇L(x)‖₂ = √(λ (2 - ηλ) / η) ‖x‖₂`: the gradient norm that keeps `‖x‖` where it is (Li et al. 2022).

    `relative_global_clip_` clips to `√C` times what this is for `ηλ → 0`.

    Args:
        lr: learning rate η, above 0.
        weight_decay: λ, above 0, with `ηλ < 2`.
        norm: `‖x‖₂` of the parameters, 0 or more.

    Returns:
        As `equilibrium_norm`; inf where η is 0 in a tensor.

    Raises:
        ConfigurationError: if an argument is no real number, or three floats are given that are out of range.
    """
    _require_numbers(lr=lr, weight_decay=weight_decay, norm=norm)
    given = (lr, weight_decay, norm)
    if not any(isinstance(value, Tensor) for value in given):
        lr, weight_decay, norm = (float(value) for value in given)
        _require("lr", lr, zero=False)
        _require_equilibrium(lr, weight_decay)
        _require("norm", norm, zero=True)
        return math.sqrt(weight_decay * (2 - lr * weight_decay) / lr) * norm
    eta, decay, n = _tensors(*given)
    found = (decay * (2 - eta * decay) / eta).sqrt() * n
    return torch.where(_has_equilibrium(eta, decay) & (n >= 0), found, math.nan)


def _has_equilibrium(eta: Tensor, decay: Tensor) -> Tensor:
    return (eta >= 0) & (decay > 0) & (eta * decay < 2)


def _require_equilibrium(lr: float, weight_decay: float) -> None:
    _require("lr", lr, zero=True)
    _require("weight_decay", weight_decay, zero=False)
    if not lr * weight_decay < 2:
        raise ConfigurationError(
            f"lr · weight_decay must be below 2, got {lr} · {weight_decay} = {lr * weight_decay:g}: "
            "weight decay alone makes the parameters grow, and there is no equilibrium"
        )


def _require_numbers(**values: object) -> None:
    for name, value in values.items():
        real = not value.is_complex() if isinstance(value, Tensor) else isinstance(value, Real)
        if not real or isinstance(value, bool):
            shown = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else repr(value)
            raise ConfigurationError(f"{name} must be a real number or a tensor of them, got {shown}")


def _require(name: str, value: float, *, zero: bool) -> None:
    if not (value > 0 or (zero and value == 0)) or math.isinf(value):
        raise ConfigurationError(
            f"{name} must be finite and {'0 or more' if zero else 'above 0'}, got {value}"
        )


def _tensors(*values: Tensor | float) -> tuple[Tensor, ...]:
    """All as tensors of the working dtype, on the device of one that is a tensor."""
    given = [value for value in values if isinstance(value, Tensor)]
    dtype = working_dtype(*given)
    like = max(given, key=lambda t: t.dim())
    return tuple(
        v.detach().to(like.device, dtype)
        if isinstance(v, Tensor)
        else like.new_full((), float(v), dtype=dtype)
        for v in values
    )
