"""Relative global clipping: gradients no longer than their share of the parameters' norm (Li et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.hooks.sharding import is_sharded

_NAME = "relative_global_clip_"
Rate = float | Tensor


class RelativeClip(NamedTuple):
    """What `relative_global_clip_` found, as 0-dim tensors on the gradients' device.

    Attributes:
        norm: ℓ2 norm of all gradients before they were clipped.
        max_norm: what they were clipped to; inf where every learning rate is 0.
        clipped: whether they were longer than that, boolean.
    """

    norm: Tensor
    max_norm: Tensor
    clipped: Tensor


class _Group(NamedTuple):
    """Parameters with gradients, and what they are trained with."""

    parameters: list[Tensor]
    gradients: list[Tensor]
    lr: Rate
    weight_decay: Rate


@torch.no_grad()
def relative_global_clip_(
    parameters: Tensor | Iterable[Tensor] | Iterable[Mapping[str, Any]] | Optimizer,
    lr: Rate | None = None,
    weight_decay: Rate | None = None,
    C: float = 2.0,
    *,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> RelativeClip:
    """Clip gradients in place to `√(2Cλ/η) ‖x‖₂` (relative global clipping, Li et al., ICML 2022).

    η is the learning rate, λ the weight decay, x all parameters that have a gradient. For SGD with weight
    decay and no momentum on a scale-invariant loss, gradients of one size are `√(λ(2-ηλ)/η) ‖x‖₂` long at
    equilibrium (`measures.equilibrium_gradient_norm`): with C > 1 these are left alone, and only the rare
    longer ones are cut. Call it after `backward` (after unscaling, with a gradient scaler) and before
    `optimizer.step()`.

    Where groups differ in η or λ, what is balanced is what weight decay takes of `‖x‖²` in a step, to first
    order `Σ 2 η_g λ_g ‖x_g‖²`, and what the gradients add, `Σ η_g² ‖g_g‖²`. All gradients are multiplied by
    one factor, so that their direction stays, such that `Σ η_g² ‖g_g‖² ≤ C Σ 2 η_g λ_g ‖x_g‖²`; `max_norm` is
    what that leaves of their norm. With one η and λ this is the formula above. A group whose learning rate
    is 0 has no say; where all are 0 nothing is clipped.

    Nothing waits for the device, unless `error_if_nonfinite` asks for it. Gradients that are short enough
    keep every bit. A norm that is NaN leaves gradients as they are; one that is inf makes finite gradients 0.
    Sharded parameters (DTensor: FSDP2, tensor parallel) are measured whole; all processes have to call. The
    flat shards of FSDP1 are not known to be shards: do not use it there.

    Args:
        parameters: a tensor, tensors, param-group dicts, or an optimizer. A tensor that comes twice counts
            once.
        lr: η, a float or a 0-dim tensor; taken from the groups if None, for all of them if given.
        weight_decay: λ, likewise.
        C: how many times the equilibrium's squared gradient norm is allowed; a real number above 1.
        error_if_nonfinite: raise where the norm is NaN or inf, before anything is clipped.
        foreach: use the kernels that treat many tensors at once; by default for plain tensors.

    Returns:
        RelativeClip(norm, max_norm, clipped), in float32, or float64 where a gradient is.

    Raises:
        ConfigurationError: if an argument is of another kind; if C ≤ 1; if λ is missing, 0 or negative, or η
            is missing or negative, in a group that is trained; if a gradient is sparse or complex. Gradients
            are left as they were. Values of tensors on an accelerator are not looked at.
        RuntimeError: if the norm is not finite and `error_if_nonfinite` is set.
    """
    if not _is_real(C) or not 1 < C < math.inf:
        raise ConfigurationError(
            f"{_NAME}: C must be a number above 1, got {C!r}: at C = 1 the equilibrium's own gradients "
            "are clipped; 2 is the paper's"
        )
    C = float(C)
    if not any(foreach is known for known in (None, True, False)):
        raise ConfigurationError(f"{_NAME}: foreach must be True, False or None, got {foreach!r}")
    listed = _listed(parameters)
    groups = [_checked(index, group, lr, weight_decay) for index, group in enumerate(listed)]
    groups = [group for group in groups if group.gradients]
    if not groups:
        some = next((p for group in listed for p in group["params"]), torch.zeros(()))
        zero = torch.zeros((), device=some.device)
        return RelativeClip(zero, zero.clone(), torch.zeros_like(zero, dtype=torch.bool))

    every = [g for group in groups for g in group.gradients]
    device = every[0].device
    dtype = torch.float64 if any(g.dtype == torch.float64 for g in every) else torch.float32
    g_norms = torch.stack([_norm(group.gradients, device, dtype, foreach) for group in groups])
    x_norms = torch.stack([_norm(group.parameters, device, dtype, foreach) for group in groups])
    norm = torch.linalg.vector_norm(g_norms)
    max_norm = _max_norm(groups, g_norms, x_norms, C)
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise RuntimeError(
            f"{_NAME}: the norm of the gradients is {float(norm)}, so they cannot be clipped; nothing was "
            "changed. Leave this step out, or pass error_if_nonfinite=False"
        )
    clipped = norm > max_norm
    _scale(every, torch.where(clipped, max_norm / norm, 1.0), foreach)
    return RelativeClip(norm, max_norm, clipped)


def _max_norm(groups: list[_Group], g_norms: Tensor, x_norms: Tensor, C: float) -> Tensor:
    """The norm that the gradients may have; inf where every η is 0."""
    first = groups[0]
    if all(_same(g.lr, first.lr) and _same(g.weight_decay, first.weight_decay) for g in groups):
        eta, decay = (_as_tensor(v, g_norms) for v in (first.lr, first.weight_decay))
        allowed = (2 * C * decay / eta).sqrt() * torch.linalg.vector_norm(x_norms)
        return torch.where(eta == 0, math.inf, allowed)
    etas = torch.stack([_as_tensor(group.lr, g_norms) for group in groups])
    decays = torch.stack([_as_tensor(group.weight_decay, g_norms) for group in groups])
    allowed = torch.linalg.vector_norm((2 * C * etas * decays).sqrt() * x_norms)
    added = torch.linalg.vector_norm(etas * g_norms)  # 0 where no gradient moves anything
    return torch.where(added == 0, math.inf, allowed * (torch.linalg.vector_norm(g_norms) / added))


def _listed(parameters: Any) -> list[dict[str, Any]]:
    """As param groups with lists of parameters, each parameter once."""
    if isinstance(parameters, Optimizer):
        parameters = parameters.param_groups
    if isinstance(parameters, Mapping) and "params" not in parameters:
        raise ConfigurationError(
            f"{_NAME}: a param group is a dict with 'params', got one with {sorted(map(str, parameters))}"
        )
    given = [parameters] if isinstance(parameters, Mapping) else _tensors(parameters, "")
    if not any(isinstance(item, Mapping) for item in given):
        given = [{"params": given}]
    seen: set[int] = set()
    groups = []
    for index, item in enumerate(given):
        if not isinstance(item, Mapping) or "params" not in item:
            raise ConfigurationError(
                f"{_NAME}: parameters must be tensors, param-group dicts with 'params', or an optimizer, got "
                f"{type(item).__name__} at {index}"
            )
        tensors = _tensors(item["params"], f" in group {index}")
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                raise ConfigurationError(
                    f"{_NAME}: expected tensors, got {type(tensor).__name__} in group {index}; pass "
                    "model.parameters() or an optimizer"
                )
        once = [t for t in tensors if not (id(t) in seen or seen.add(id(t)))]  # type: ignore[func-returns-value]
        groups.append({**item, "params": once})
    return groups


def _tensors(given: Any, where: str) -> list[Any]:
    """As a list, of whatever it holds."""
    if isinstance(given, Tensor):
        return [given]
    if isinstance(given, nn.Module) or not isinstance(given, Iterable):
        what = f"the module {type(given).__name__}" if isinstance(given, nn.Module) else repr(given)
        raise ConfigurationError(
            f"{_NAME}: expected tensors, got {what}{where}; pass model.parameters() or an optimizer"
        )
    return list(given)


def _checked(index: int, group: dict[str, Any], lr: Rate | None, weight_decay: Rate | None) -> _Group:
    """A group's gradients and rates; nothing is touched."""
    parameters: list[Tensor] = group["params"]
    where = f"group {index} (first parameter of shape {list(parameters[0].shape)})" if parameters else ""
    found = [(p, p.grad) for p in parameters if p.grad is not None]
    lr = group.get("lr") if lr is None else lr
    weight_decay = group.get("weight_decay") if weight_decay is None else weight_decay
    if parameters and (found or any(p.requires_grad for p in parameters)):
        _require_rate("lr", lr, where, "learning rate", zero=True)
        _require_rate("weight_decay", weight_decay, where, "weight decay", zero=False)
    for parameter, gradient in found:
        if gradient.layout != torch.strided or gradient.is_complex():
            kind = "complex" if gradient.is_complex() else "sparse"
            raise ConfigurationError(
                f"{_NAME}: {where}: the gradient of a parameter of shape {list(parameter.shape)} is {kind}, "
                "which is not supported; " + ("use sparse=False" if kind == "sparse" else "leave it out")
            )
    rates = (_plain(lr), _plain(weight_decay))
    return _Group([p.detach() for p, _ in found], [g for _, g in found], *rates)


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _plain(rate: Rate | None) -> Rate:
    """None only where a group has no gradient: of NumPy's numbers, what torch takes."""
    if rate is None:
        return 0.0
    return rate if isinstance(rate, Tensor) else float(rate)


def _require_rate(name: str, value: Any, where: str, meaning: str, *, zero: bool) -> None:
    if value is None:
        raise ConfigurationError(
            f"{_NAME}: {where} has no {meaning}; pass {name}=…, or the optimizer in place of its parameters"
        )
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            raise ConfigurationError(
                f"{_NAME}: {where}: {name} must be one number, got a tensor of shape {list(value.shape)}"
            )
        if value.device.type != "cpu":
            return  # to look at it would wait for the device
        value = value.item()
    if not _is_real(value):
        raise ConfigurationError(f"{_NAME}: {where}: {name} must be a number or a tensor, got {value!r}")
    if not (0 <= value < math.inf) or (value == 0 and not zero):
        least = "0 or more" if zero else "above 0"
        advice = (
            ""
            if zero
            else "; the clipping is relative to the weight decay: give the group one, "
            "or pass only groups that have one"
        )
        raise ConfigurationError(f"{_NAME}: {where}: {name} must be {least}, got {value}{advice}")


def _norm(tensors: list[Tensor], device: torch.device, dtype: torch.dtype, foreach: bool | None) -> Tensor:
    """ℓ2 norm of all tensors, of the whole where they are sharded, without waiting."""
    alike: dict[Any, list[Tensor]] = {}
    for t in tensors:
        spread: Any = t
        layout = (spread.device_mesh, spread.placements) if is_sharded(t) else None
        alike.setdefault((t.device, t.dtype, layout), []).append(t)
    norms: list[Tensor] = []
    for (_, kind, layout), some in alike.items():
        # float16 and bfloat16 are summed, and their norms kept, in float32.
        working = torch.float32 if kind.itemsize < 4 else kind
        if foreach is not False:
            each = list(torch._foreach_norm(some, 2.0, dtype=working))
        else:
            each = [torch.linalg.vector_norm(t, dtype=working) for t in some]
        norm: Any = torch.linalg.vector_norm(torch.stack(each))
        norms.append((norm if layout is None else norm.full_tensor()).to(device, dtype))
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def _scale(gradients: list[Tensor], factor: Tensor, foreach: bool | None) -> None:
    """Multiply in place; of a sharded gradient the part that this process holds."""
    alike: dict[Any, list[Tensor]] = {}
    for g in gradients:
        held: Any = g
        part: Tensor = held.to_local() if is_sharded(g) else g
        alike.setdefault((part.device, part.dtype), []).append(part)
    for (device, _), some in alike.items():
        here = factor.to(device)
        if foreach is not False:
            torch._foreach_mul_(some, here)
        else:
            for g in some:
                g.mul_(here)


def _as_tensor(value: Rate, like: Tensor) -> Tensor:
    """A rate on a device; a number is filled in there, as a copy from the host would wait."""
    if isinstance(value, Tensor):
        return value.detach().reshape(()).to(like.device, like.dtype, non_blocking=True)
    return torch.full((), value, device=like.device, dtype=like.dtype)


def _same(a: Rate, b: Rate) -> bool:
    """Whether two rates are known to be the same without looking into tensors."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    return a == b
