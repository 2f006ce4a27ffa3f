"""γ in optimizers: a group of its own, for new optimizers and for those that run already."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.remedies.reparametrization import stepping
from entropy_monitor.remedies.reparametrization.folding import scales_of
from entropy_monitor.remedies.reparametrization.spectral import MARK, SpectralScale

# What torch's schedulers keep for each group, and whether it is a learning rate.
_PER_GROUP = {
    "base_lrs": True,
    "_last_lr": True,
    "min_lrs": True,
    "max_lrs": True,
    "lr_lambdas": False,
    "base_momentums": False,
    "max_momentums": False,
}
_UNFIT = {"LBFGS": "has one group of parameters", "Muon": "takes matrices only"}

logger = logging.getLogger("entropy_monitor")

_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "base_lr")


def param_groups(
    model: nn.Module,
    lr: float,
    *,
    gamma_lr: float = 2.0,
    weight_decay: float | None = None,
    gamma_weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: γ apart from everything else.

    In the paper's large runs γ learns twice as fast as the rest (Zhai et al. 2023, appendix D.2). Weight
    decay of a reparametrized weight changes no function, only how far an update turns it.

    Args:
        model: with or without reparametrized layers.
        lr: learning rate.
        gamma_lr: that of γ, as a multiple of `lr`.
        weight_decay: of all but γ; by default the optimizer's own.
        gamma_weight_decay: of γ.

    Returns:
        One group, or two, of the parameters that train.

    Raises:
        ConfigurationError: if a value is negative, or nothing trains.
    """
    given = {"lr": lr, "gamma_lr": gamma_lr, "gamma_weight_decay": gamma_weight_decay}
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    _require_not_negative("param_groups", given | decay)
    gammas = [scale.gamma for _, scale in _training(model)]
    apart = {id(gamma) for gamma in gammas}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
    groups: list[dict[str, Any]] = [
        {"params": rest, "lr": lr, **decay},
        {"params": gammas, "lr": lr * gamma_lr, "weight_decay": gamma_weight_decay, MARK: True},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ConfigurationError(f"param_groups: {type(model).__name__} has no parameter that trains")
    return groups


def convert_optimizer(
    optimizer: Optimizer,
    model: nn.Module,
    *,
    gamma_lr: float = 2.0,
    gamma_weight_decay: float = 0.0,
    schedulers: Sequence[Any] = (),
) -> Optimizer:
    """Bring an optimizer that runs already in line with its model after `sigma_reparam` or `fold`, in place.

    Weights are the parameters that they were, so their state (momentum, second moments, step) is carried over
    as it is: with γ = σ it is of the gradient that they go on to have, but for its part along uvᵀ. γ joins in
    groups of its own, one for each group that holds such weights, with the options of that group but for
    learning rate and weight decay, and begins with an empty state. After `fold` γ leaves.

    Args:
        optimizer: whose parameters are those of the model.
        model: after the conversion.
        gamma_lr: learning rate of γ, as a multiple of that of the weight's group.
        gamma_weight_decay: of γ.
        schedulers: those of `torch.optim.lr_scheduler` that drive the optimizer: they are given the new
            groups too.

    Returns:
        The optimizer.

    Raises:
        ConfigurationError: if a value is negative, the optimizer holds nothing of the model or cannot take γ
            (LBFGS has one group, Muon takes matrices only), weights were replaced (`weight_norm`), a
            scheduler is of another optimizer, or none is given and the optimizer has one. Nothing is changed
            then.
    """
    _require_not_negative(
        "convert_optimizer", {"gamma_lr": gamma_lr, "gamma_weight_decay": gamma_weight_decay}
    )
    mine = {id(p) for p in model.parameters()}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not held & mine:
        raise ConfigurationError(
            f"convert_optimizer: the optimizer holds no parameter of {type(model).__name__}; was the model "
            "made anew? Make the optimizer anew then, from em.param_groups"
        )
    _require_fit(optimizer, model, held)
    driven = list(_flattened(schedulers, optimizer))
    if not driven and getattr(optimizer.step, "_wrapped_by_lr_sched", False):
        raise ConfigurationError(
            "convert_optimizer: a learning rate scheduler drives this optimizer, and it must learn of the "
            "new groups: give schedulers=[scheduler]"
        )
    _drop_folded(optimizer)
    found: dict[int, list[tuple[str, Tensor]]] = {}
    for name, scale in _training(model):
        if id(scale.gamma) not in held:
            at = _group_of(optimizer, scale.weight)
            if at is None:
                logger.warning(
                    "entropy-monitor: convert_optimizer: this optimizer does not hold %s, and so not its γ; "
                    "convert the one that does",
                    name,
                )
            else:
                found.setdefault(at, []).append((f"{name}.gamma", scale.gamma))
    for at, gammas in sorted(found.items()):
        optimizer.add_param_group(
            _group_like(optimizer.param_groups[at], gammas, gamma_lr, gamma_weight_decay)
        )
        for scheduler in driven:
            _extend(scheduler, at, gamma_lr)
    return optimizer


def _training(model: nn.Module) -> Iterator[tuple[str, SpectralScale]]:
    """Weights by name whose γ trains."""
    for name, scale in scales_of(model):
        if scale.is_learned and scale.gamma.requires_grad:
            yield name, scale


def _group_of(optimizer: Optimizer, weight: Tensor | None) -> int | None:
    for i, group in enumerate(optimizer.param_groups):
        if any(p is weight for p in group["params"]):
            return i
    return None


def _group_like(
    group: dict[str, Any], gammas: list[tuple[str, Tensor]], factor: float, weight_decay: float
) -> dict[str, Any]:
    """A group for γ with the options of another one."""
    made = {k: v for k, v in group.items() if k not in ("params", "param_names")}
    made.update({rate: made[rate] * factor for rate in _RATES if rate in made})
    if "weight_decay" in made:
        made["weight_decay"] = weight_decay
    named = "param_names" in group
    return made | {"params": gammas if named else [gamma for _, gamma in gammas], MARK: True}


def _require_fit(optimizer: Optimizer, model: nn.Module, held: set[int]) -> None:
    """Raise where γ cannot join, or weights are not the parameters that the optimizer has."""
    kind = next((c.__name__ for c in type(optimizer).__mro__ if c.__name__ in _UNFIT), None)
    if kind is not None and any(scale.is_learned for _, scale in scales_of(model)):
        raise ConfigurationError(
            f"convert_optimizer: {type(optimizer).__name__} {_UNFIT[kind]}; give γ, the second group of "
            "em.param_groups(model, lr), to an optimizer of its own"
        )
    for name, parameter in model.named_parameters():
        if name.endswith(".original0") and parameter.requires_grad and id(parameter) not in held:
            raise ConfigurationError(
                f"convert_optimizer: {name} is a new parameter, which weight norm made in place of the "
                "weight that the optimizer holds; make the optimizer anew, from em.param_groups(model, lr)"
            )


def _drop_folded(optimizer: Optimizer) -> None:
    """Take γ of folded layers out of their groups; an empty group stays, for schedulers count them."""
    used = {id(scale.gamma) for scale in stepping.followed()}
    for group in optimizer.param_groups:
        mine = [group.get(MARK) or hasattr(p, MARK) for p in group["params"]]
        kept = [i for i, p in enumerate(group["params"]) if id(p) in used or not mine[i]]
        for i in set(range(len(group["params"]))) - set(kept):
            optimizer.state.pop(group["params"][i], None)
        for key in {"params", "param_names"} & set(group):
            group[key] = [group[key][i] for i in kept]


def _flattened(schedulers: Iterable[Any], optimizer: Optimizer) -> Iterable[Any]:
    """Schedulers, and those within them."""
    for scheduler in schedulers:
        inner = getattr(scheduler, "_schedulers", None)
        if inner is not None:
            yield from _flattened(inner, optimizer)
        if getattr(scheduler, "optimizer", None) is not optimizer:
            raise ConfigurationError(
                f"convert_optimizer: {type(scheduler).__name__} is not a scheduler of this optimizer"
            )
        yield scheduler


def _extend(scheduler: Any, group: int, factor: float) -> None:
    """Give a scheduler one group more, like one that it has."""
    for name, is_rate in _PER_GROUP.items():
        kept = getattr(scheduler, name, None)
        if isinstance(kept, list) and len(kept) > group:
            value = kept[group]
            kept.append(value * factor if is_rate and value is not None else value)


def _require_not_negative(remedy: str, values: dict[str, float]) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise ConfigurationError(f"{remedy}: {name} must not be negative, got {value!r}")
