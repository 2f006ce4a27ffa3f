"""When u and v follow their weights: once after each optimizer step, whatever forwards there were."""

from __future__ import annotations

import functools
import itertools
import weakref
from typing import TYPE_CHECKING, Any

from torch._compile import _disable_dynamo as _never_traced
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from entropy_monitor.remedies.reparametrization.power_iteration import iterate

if TYPE_CHECKING:
    from entropy_monitor.remedies.reparametrization.spectral import SpectralScale

_live: weakref.WeakSet[SpectralScale] = weakref.WeakSet()
_began: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
_ticks = itertools.count()
_serials = itertools.count()


def follow(scale: SpectralScale) -> None:
    """From now on, have u and v follow the weight after each step of an optimizer that holds it."""
    scale.serial = next(_serials)
    _live.add(scale)
    _listen()


@functools.cache
def _listen() -> None:
    register_optimizer_step_pre_hook(_never_traced(_before_step))
    register_optimizer_step_post_hook(_never_traced(_after_step))


def forget(scale: SpectralScale) -> None:
    """No longer follow."""
    _live.discard(scale)


def followed() -> list[SpectralScale]:
    """All that are part of a layer, in the order in which they were made."""
    return sorted((s for s in _live if s.holder is not None), key=lambda s: s.serial)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG001
    if _live:
        _began[optimizer] = next(_ticks)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG001
    """Follow the weights of an optimizer, but for those that one within it has seen to since it began."""
    if not _live:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    mine = {id(p) for p in parameters}
    flattened = {id(info.module) for p in parameters for info in getattr(p, "_param_infos", ())}
    began = _began.get(optimizer, 0)
    due = []
    for scale in followed():  # the same order on every process
        holder = scale.holder
        weight = holder.original
        in_flat = id(holder) in flattened
        if not (in_flat or id(weight) in mine) or scale.stepped >= began:
            continue
        if in_flat or weight.dim() < 2:  # FSDP1 has flattened it: the next forward will have it whole
            scale.waits = True
        else:
            due.append((scale, weight))
        scale.stepped = next(_ticks)
    iterate(due)
    for scale, _ in due:
        scale.note_weight()
