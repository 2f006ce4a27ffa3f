"""Between reparametrized layers and plain ones: in models, and in state dicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.hooks import module_names
from entropy_monitor.hooks.sharding import is_sharded
from entropy_monitor.remedies.reparametrization import stepping
from entropy_monitor.remedies.reparametrization.scaling import scaled_weight
from entropy_monitor.remedies.reparametrization.spectral import (
    SpectralScale,
    laid_out_as,
    singular_vectors,
    whole,
)
from entropy_monitor.remedies.selection import LayerWeight
from entropy_monitor.remedies.wrapping import is_fully_sharded

_MARK = ".parametrizations."


def fold(model: nn.Module) -> nn.Module:
    """Make plain layers of reparametrized ones, in place: what they compute stays, γ is gone.

    Undoes `sigma_reparam`, `spectral_norm` and `weight_norm`; other parametrizations are left alone, such as
    weight norms that are the model's own. State dicts have their original keys again. The weight stays the
    parameter that it was before (but for `weight_norm`, which made new ones).

    Args:
        model: one with or without such layers.

    Returns:
        The model.

    Raises:
        ConfigurationError: if FSDP or DistributedDataParallel holds the weights. Nothing is changed then.
    """
    done: set[int] = set()
    found = list(_reparametrized(model))
    _require_not_sharded(model, found)
    for layer, tensor, kept in found:
        if isinstance(kept[0], SpectralScale):
            weight = kept.original
            if id(weight) not in done:  # a tied one is folded once
                done.add(id(weight))
                with torch.no_grad():
                    weight.copy_(kept())
            _drop(layer, tensor)
        else:
            _drop(layer, tensor, leave_parametrized=True)
    return model


def fold_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict that the model would have after `fold`: for code that knows nothing of this package.

    Args:
        state_dict: of a model with reparametrized layers, or a part of it (whole layers); anything else in it
            is passed on as it is. A state dict does not tell whose a weight norm is: all are folded.

    Returns:
        A new dict. Folded weights are new tensors.
    """
    folded: dict[str, Any] = {}
    for key, value in state_dict.items():
        layer, mark, rest = f".{key}".rpartition(_MARK)
        tensor, _, part = rest.partition(".")
        stem = f"{layer}{_MARK}{tensor}."[1:]
        if not mark or not {f"{stem}0.u", f"{stem}original1"} & state_dict.keys():
            folded[key] = value
        elif part in ("original", "original0"):
            folded[f"{layer}.{tensor}".lstrip(".")] = _folded(state_dict, stem)
    return folded


def parametrized(layer: nn.Module, tensor: str, convert: Callable[[], object]) -> None:
    """Have `convert` parametrize a weight, and keep what makes it possible to put it back in its place."""
    place = list(layer._parameters).index(tensor)
    convert()
    layer.parametrizations[tensor].place = place  # type: ignore[index, union-attr]


def accept_plain_weights(layer: nn.Module) -> None:
    """Have a layer with `SpectralScale` load state dicts of the plain layer too, with γ = σ."""
    if not _hooks_of(layer):
        layer._register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
            _take_plain, with_module=True
        )


def undo(weight: LayerWeight) -> None:
    """Take back a conversion that was begun; the weight is what it was."""
    for layer, tensor in ((weight.layer, weight.tensor), *((m, t) for _, m, t in weight.others)):
        if parametrize.is_parametrized(layer, tensor):
            ours = isinstance(layer.parametrizations[tensor][0], SpectralScale)  # type: ignore[index]
            _drop(layer, tensor, leave_parametrized=not ours)


def scales_of(model: nn.Module) -> Iterator[tuple[str, SpectralScale]]:
    """Every reparametrized weight of a model once: its qualified name, and its scale."""
    names = module_names(model)
    seen: set[int] = set()
    for layer, tensor, kept in _reparametrized(model):
        scale = kept[0]
        if isinstance(scale, SpectralScale) and id(scale) not in seen:
            seen.add(id(scale))
            yield f"{names[layer]}.{tensor}", scale


def _reparametrized(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    for layer in model.modules():
        if not parametrize.is_parametrized(layer):
            continue
        lists: Any = layer.parametrizations
        for tensor, kept in list(lists.items()):
            if len(kept) == 1 and hasattr(kept, "place"):
                yield layer, tensor, kept


def _require_not_sharded(model: nn.Module, found: Sequence[tuple[nn.Module, str, Any]]) -> None:
    """Raise where FSDP keeps weights by the places that they have."""
    names = module_names(model)
    if found and any(isinstance(module, DistributedDataParallel) for module in names):
        raise ConfigurationError(
            "fold: the model is wrapped by DistributedDataParallel, which would lose track of its "
            "parameters; after training give the module within, em.fold(model.module)"
        )
    wrapped = any(is_fully_sharded(module) for module in names)
    for layer, tensor, kept in found:
        split = any(not p.is_replicate() for p in getattr(getattr(kept[0], "gamma", None), "placements", ()))
        if wrapped or split:  # else split as a weight is in tensor parallel
            raise ConfigurationError(
                f"fold: {names[layer]}.{tensor} is sharded by FSDP, which would lose track of it; gather the "
                "state dict instead, with get_model_state_dict(model, "
                "options=StateDictOptions(full_state_dict=True)) of torch.distributed.checkpoint.state_dict, "
                "and give it to em.fold_state_dict"
            )


def _drop(layer: nn.Module, tensor: str, *, leave_parametrized: bool = False) -> None:
    """Take a parametrization off; the weight becomes an ordinary parameter in the place that it had."""
    kept: Any = layer.parametrizations[tensor]  # type: ignore[index]
    trains = any(p.requires_grad for p in kept.parameters())
    place, scale = getattr(kept, "place", 0), kept[0]
    cls = type(layer)  # made by torch for this layer, shared with its deep copies: they keep it as it is
    layer.__class__ = type(cls.__name__, cls.__bases__, dict(cls.__dict__))
    parametrize.remove_parametrizations(layer, tensor, leave_parametrized)
    value = getattr(layer, tensor)
    if not isinstance(value, nn.Parameter):
        delattr(layer, tensor)
        layer.register_parameter(tensor, nn.Parameter(value.detach(), requires_grad=trains))
    order = [name for name in layer._parameters if name != tensor]
    order.insert(place, tensor)
    for name in order:
        layer._parameters[name] = layer._parameters.pop(name)
    if isinstance(scale, SpectralScale):
        stepping.forget(scale)
    if not any(owner is layer for owner, *_ in _reparametrized(layer)):
        for key in _hooks_of(layer):
            del layer._load_state_dict_pre_hooks[key]


def _hooks_of(layer: nn.Module) -> list[int]:
    hooks = layer._load_state_dict_pre_hooks
    return [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is _take_plain]


def _take_plain(layer: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before loading: put what a plain weight amounts to in its place."""
    for owner, tensor, kept in _reparametrized(layer):
        stem = f"{prefix}parametrizations.{tensor}."
        if owner is not layer or f"{prefix}{tensor}" not in state_dict or f"{stem}original" in state_dict:
            continue
        scale = kept[0]
        weight = state_dict.pop(f"{prefix}{tensor}")
        state_dict[f"{stem}original"] = weight
        if weight.shape != kept.original.shape:  # torch says what is wrong
            state_dict |= {f"{stem}0.{name}": value for name, value in scale.state_dict().items()}
            continue
        group = None if scale.group is None else scale.group.to(weight.device)
        u, sigma, v = singular_vectors(weight.detach(), group)
        gamma = sigma if scale.is_learned else torch.ones_like(sigma)
        for name, value in (("u", u), ("v", v), ("gamma", gamma)):
            state_dict[f"{stem}0.{name}"] = laid_out_as(value, getattr(scale, name))
        if group is not None:
            state_dict[f"{stem}0.group"] = group


def _folded(state_dict: Mapping[str, Any], stem: str) -> Tensor:
    if f"{stem}original1" in state_dict:
        g, v = state_dict[f"{stem}original0"], state_dict[f"{stem}original1"]
        alike = [d for d in range(g.dim()) if g.shape[d] == v.shape[d]]  # elsewhere g has size 1
        dim = max(alike, key=lambda d: g.shape[d])
        return torch._weight_norm(v, g, dim)
    group = state_dict.get(f"{stem}0.group")
    weight, gamma, u, v = (state_dict[f"{stem}{name}"] for name in ("original", "0.gamma", "0.u", "0.v"))
    with torch.no_grad():
        if group is None or not is_sharded(weight):
            return scaled_weight(weight, gamma, u, v, group)
        return laid_out_as(scaled_weight(whole(weight), whole(gamma), u, v, group), weight)
