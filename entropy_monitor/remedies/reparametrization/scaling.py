"""`Ŵ = (γ / σ(W)) W` as a function with its derivatives, σ(W) = uᵀWv (Zhai et al. 2023, section 3.2)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from entropy_monitor.hooks.sharding import is_sharded
from entropy_monitor.measures._precision import working_dtype


def scaled_weight(weight: Tensor, gamma: Tensor, u: Tensor, v: Tensor, group: Tensor | None) -> Tensor:
    """`(γ / uᵀWv) W`; W as it is where uᵀWv = 0.

    Args:
        weight: `[rows, …]`, floating; where it is a DTensor, all lines are one group.
        gamma: `[groups]`.
        u: as in `SpectralScale`.
        v: likewise.
        group: likewise.

    Returns:
        Of shape and dtype of `weight`; computed in float32 or float64, whatever autocast says.
    """
    if is_sharded(weight):
        gamma, u, v = (copied_beside(weight, x) for x in (gamma, u, v))
    matrix = weight if weight.dim() == 2 else weight.flatten(1)
    function = _Scaled if torch.compiler.is_compiling() else _ScaledEagerly
    scaled: Tensor = function.apply(matrix, gamma, u, v, group)[0]  # type: ignore[no-untyped-call]
    return scaled if weight.dim() == 2 else scaled.view_as(weight)


def copied_beside(weight: Any, x: Any) -> Any:
    """A tensor, plain and the same on every process or split, as copies on the mesh of a DTensor."""
    from torch.distributed.tensor import DTensor, Replicate

    copies = [Replicate()] * weight.device_mesh.ndim
    if is_sharded(x):
        return x.redistribute(placements=copies)
    return DTensor.from_local(x, weight.device_mesh, copies, run_check=False)


class _Scaled(torch.autograd.Function):
    """One product with the matrix forward, and two passes over it backward; autograd by itself takes five.

    With Ŵ = s W, s = γ/σ and G the gradient of Ŵ: ∂γ = ⟨G, W⟩ / σ, ∂W = s G - (s ⟨G, W⟩ / σ) uvᵀ.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        w: Tensor, gamma: Tensor, u: Tensor, v: Tensor, group: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ŵ; and σ, u, v as they were used."""
        with _exact(w):
            sigma, u, v = sigma_of(w, u, v, group)
            return (
                (w.to(sigma.dtype) * _of_lines(_quotient(gamma, sigma, 1.0), group)).to(w.dtype),
                sigma,
                u,
                v,
            )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep what the derivatives need; u and v as copies, for buffers may be written meanwhile."""
        w, gamma, _, _, group = inputs
        _, sigma, u, v = output
        ctx.mark_non_differentiable(sigma, u, v)
        ctx.save_for_backward(w, gamma, u, v, sigma, group)
        ctx.save_for_forward(w, gamma, u, v, sigma, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """The gradient."""
        w, gamma, u, v, sigma, group = ctx.saved_tensors
        with _exact(w):
            if torch.is_grad_enabled():  # for a second derivative σ is a function of W again
                sigma = _bilinear(w, u, v, group)
            wide = grad.to(sigma.dtype)
            inner = _inner(wide, w.to(sigma.dtype), group, len(gamma))
            by_gamma = _quotient(inner, sigma, 0.0)
            by_w = None
            if ctx.needs_input_grad[0]:
                ratio = _quotient(gamma, sigma, 1.0)
                by_w = _plus_outer(wide * _of_lines(ratio, group), -by_gamma * ratio, u, v, group).to(w.dtype)
            return by_w, by_gamma.to(gamma.dtype), None, None, None


class _ScaledEagerly(_Scaled):
    """The same with forward-mode derivatives, which torch.compile refuses to trace."""

    @staticmethod
    def jvp(ctx: Any, w_t: Tensor | None, gamma_t: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """The directional derivative."""
        w, gamma, u, v, sigma, group = ctx.saved_tensors
        with _exact(w):
            rate = torch.zeros_like(sigma) if gamma_t is None else _quotient(gamma_t, sigma, 0.0)
            out = torch.zeros_like(w, dtype=sigma.dtype)
            if w_t is not None:
                wide = w_t.to(sigma.dtype)
                ratio = _quotient(gamma, sigma, 1.0)
                rate = rate - _quotient(_bilinear(wide, u, v, group), sigma, 0.0) * ratio
                out = wide * _of_lines(ratio, group)
            out = out + w.to(sigma.dtype) * _of_lines(rate, group)
            return out.to(w.dtype), None, None, None


def sigma_of(w: Tensor, u: Tensor, v: Tensor, group: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """uᵀWv `[groups]`, and u and v made to norm 1: averaged or rounded ones are not."""
    dtype = working_dtype(w)
    u, v = u.to(dtype), v.to(dtype)
    if group is None:
        u, v = u / torch.linalg.vector_norm(u), v / torch.linalg.vector_norm(v)
        return _bilinear(w, u, v, group), u, v
    by_rows = group.shape[1] == 1
    along, across = (u, v) if by_rows else (v, u)
    index = group.flatten()
    squares = along.new_zeros(across.shape[0]).index_add(0, index, along * along)
    along = along / squares.sqrt()[index]
    across = across / torch.linalg.vector_norm(across, dim=1, keepdim=True)
    u, v = (along, across) if by_rows else (across, along)
    return _bilinear(w, u, v, group), u, v


def _bilinear(w: Tensor, u: Tensor, v: Tensor, group: Tensor | None) -> Tensor:
    """uᵀWv of each group, `[groups]`."""
    w = w.to(u.dtype)
    if group is None:
        if _splits_columns(w):  # what is split is summed over first, and only a number has to be exchanged
            return _summed(torch.dot(v, torch.mv(w.t(), u)).reshape(1))
        return _summed(torch.dot(u, torch.mv(w, v)).reshape(1))
    lines, along, across = (w, u, v) if group.shape[1] == 1 else (w.t(), v, u)
    index = group.flatten()
    images = (lines @ across.t()).gather(1, index[:, None])[:, 0]
    return along.new_zeros(across.shape[0]).index_add(0, index, along * images)


def _of_lines(x: Tensor, group: Tensor | None) -> Tensor:
    """A figure of each group beside its lines: `[1]`, or as `group` lies."""
    return x if group is None else x[group]


def _quotient(x: Tensor, sigma: Tensor, instead: float) -> Tensor:
    """x/σ, another value where σ is 0."""
    zero = sigma == 0
    return (x.to(sigma.dtype) / sigma.masked_fill(zero, 1.0)).masked_fill(zero, instead)


def _inner(grad: Tensor, w: Tensor, group: Tensor | None, groups: int) -> Tensor:
    """⟨G, W⟩ `[groups]`."""
    if group is None:
        if is_sharded(w):  # to flatten it would be to gather it
            return _summed((grad * w).sum().reshape(1))
        return torch.dot(grad.reshape(-1), w.reshape(-1)).reshape(1)
    lines = (grad * w).sum(1 if group.shape[1] == 1 else 0)
    return lines.new_zeros(groups).index_add(0, group.flatten(), lines)


def _plus_outer(w: Tensor, factor: Tensor, u: Tensor, v: Tensor, group: Tensor | None) -> Tensor:
    """W + factor · uvᵀ, group by group."""
    if group is None:
        return torch.addr(w, u * factor, v)
    index = group.flatten()
    if group.shape[1] == 1:
        return w + (factor[index] * u)[:, None] * v[index]
    return w + u[index].t() * (factor[index] * v)


def _exact(w: Tensor) -> AbstractContextManager[Any]:
    """Keep autocast from rounding; entering its context costs more than asking whether it is on."""
    kind = w.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()


def _splits_columns(w: Any) -> bool:
    return is_sharded(w) and any(p.is_shard(1) for p in w.placements)


def _summed(x: Tensor) -> Tensor:
    """Where processes have summands of a value, their sum: else every use would exchange them again."""
    placements: Any = getattr(x, "placements", ())
    if not any(p.is_partial() for p in placements):
        return x
    found: Tensor = copied_beside(x, x)
    return found
