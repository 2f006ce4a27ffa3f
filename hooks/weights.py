"""Gradients and updates of the attention weights, read in the optimizer's own step."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from entropy_monitor import measures
from entropy_monitor.guard import Guard
from entropy_monitor.hooks.calls import Role
from entropy_monitor.hooks.projections import WeightPart
from entropy_monitor.hooks.recorder import LayerParts

UPDATE_FIGURES = ("grad_linf", "grad_l2", "update_sigma", "update_entropy")
_UPDATED: tuple[Role, ...] = ("query", "key")


class WeightWatcher:
    """Reads, on measured steps, what an optimizer step does to each layer's attention weights.

    Gradients are those that the optimizer uses: after accumulation, unscaling and clipping. An update is the
    difference of the weights after and before the step. Of several steps of one optimizer the last counts.

    Where a process holds only part of a layer's weights, or an optimizer other than these updates some of
    them, the layer's figures are not known: a norm of what is here would pass for the norm of all.

    Args:
        optimizers: whose steps; a parameter may be in any of them.
        layers: what is known of each layer, filled by the recorder.
        guard: keeps faults of the reading from the training.

    Attributes:
        armed: whether the next steps are read.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], layers: Mapping[str, LayerParts], guard: Guard
    ) -> None:
        self.armed = False
        self._only: Collection[str] | None = None
        self._layers = layers
        self._guard = guard
        self._gradients: dict[nn.Parameter, tuple[Tensor, Tensor]] = {}
        self._before: dict[tuple[str, Role], Tensor] = {}
        self._updates: dict[tuple[str, Role], Tensor] = {}
        self._optimized: set[nn.Parameter] = set()
        self._handles: list[RemovableHandle] = []
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._pre_step))
            self._handles.append(optimizer.register_step_post_hook(self._post_step))

    def arm(self, only: Collection[str] | None = None) -> None:
        """Forget what was read, and read the next steps.

        Args:
            only: layers to read; None for all.
        """
        self._forget()
        self._only = only
        self.armed = only is None or len(only) > 0

    def disarm(self) -> None:
        """Read no more, and forget what was read."""
        self.armed = False
        self._forget()

    def close(self) -> None:
        """Leave the optimizers as they were."""
        self.disarm()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def figures(self, layers: Sequence[str], device: torch.device) -> Tensor:
        """What was read.

        `update_sigma` and `update_entropy` of weights of more than 64 rows and columns are estimates; their
        errors stand at `measures.update_spectrum`.

        Args:
            layers: qualified names.
            device: where the result lies.

        Returns:
            `[len(layers), len(UPDATE_FIGURES)]`, float32; entropies in nats; NaN = not known.
        """
        if not self._gradients and not self._updates:
            return torch.full((len(layers), len(UPDATE_FIGURES)), math.nan, device=device)
        return torch.stack([self._layer_figures(name, device) for name in layers])

    def _forget(self) -> None:
        self._gradients.clear()
        self._before.clear()
        self._updates.clear()
        self._optimized.clear()

    def _pre_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.armed:
            self._guard.run("reading gradients", self._read_before, optimizer, args, kwargs)

    def _post_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.armed:
            self._guard.run("reading updates", self._read_after, optimizer, args, kwargs)

    @torch.no_grad()
    def _read_before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        makes_gradients = _has_closure(args, kwargs)
        if not makes_gradients:
            self._read_gradients(optimizer)
        for key, part in self._parts_of(optimizer):
            if key[1] in _UPDATED and (makes_gradients or part.parameter.grad is not None):
                self._before[key] = part.place.read(part.parameter).clone()

    @torch.no_grad()
    def _read_after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if _has_closure(args, kwargs):  # it made the gradients within the step
            self._read_gradients(optimizer)
        for key, part in self._parts_of(optimizer):
            if (before := self._before.pop(key, None)) is not None and part.parameter.grad is not None:
                self._updates[key] = _difference(part.place.read(part.parameter), before)

    def _read_gradients(self, optimizer: Optimizer) -> None:
        scale = getattr(optimizer, "grad_scale", None)  # a fused step under GradScaler unscales inside
        for parameter in {part.parameter for _, part in self._parts_of(optimizer)}:
            if parameter.grad is not None:
                self._gradients[parameter] = _norms(parameter.grad, scale)

    def _parts_of(self, optimizer: Optimizer) -> Iterator[tuple[tuple[str, Role], WeightPart]]:
        mine = {p for group in optimizer.param_groups for p in group["params"]}
        self._optimized |= mine
        for name, parts in self._layers.items():
            if self._only is not None and name not in self._only:
                continue
            for role, part in parts.weights.items():
                if part.parameter in mine and not _is_sharded(part.parameter):
                    yield (name, role), part

    def _is_complete(self, layer: str) -> bool:
        """Whether all that the optimizers do to a layer's attention weights is seen here.

        FSDP2 gathers weights into other parameters than those that the optimizer has.
        """
        parts = self._layers[layer]
        if not {"query", "key"} <= set(parts.weights):
            return False  # the norm of the others would pass for that of all
        trained = {part.parameter for part in parts.weights.values() if part.parameter.requires_grad}
        return not parts.sharded and trained <= self._optimized and not any(map(_is_sharded, trained))

    def _layer_figures(self, layer: str, device: torch.device) -> Tensor:
        if not self._is_complete(layer):
            return torch.full((len(UPDATE_FIGURES),), math.nan, device=device)
        parameters = {part.parameter for part in self._layers[layer].weights.values()}
        gradients = [self._gradients[p] for p in parameters if p in self._gradients]
        updates = [self._updates[layer, role] for role in _UPDATED if (layer, role) in self._updates]
        linf = l2 = sigma = entropy = torch.full((), math.nan, device=device)
        if gradients:
            linf = torch.stack([linf for linf, _ in gradients]).max()
            l2 = torch.linalg.vector_norm(torch.stack([l2 for _, l2 in gradients]))
        if len(updates) == len(_UPDATED):
            sigma, _, entropy = measures.joint_spectrum([measures.update_spectrum(u) for u in updates])
        return torch.stack([x.to(device, torch.float32) for x in (linf, l2, sigma, entropy)])


def _difference(after: Tensor, before: Tensor) -> Tensor:
    """The update as a matrix `[H · d_head, d_model]`, in place of the copy where its dtype allows."""
    if before.dtype in (torch.float32, torch.float64):
        update = torch.sub(after, before, out=before)
    else:
        update = after.float() - before.float()
    return update.flatten(0, 1).transpose(1, 2).flatten(0, 1)


def _has_closure(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether `optimizer.step(closure)` was called, from what its hooks get: the optimizer comes first."""
    return kwargs.get("closure", args[1] if len(args) > 1 else None) is not None


def _is_sharded(parameter: Tensor) -> bool:
    """Whether a process holds only part of a parameter: its norms would need a collective.

    A DTensor has a mesh; a parameter flattened by FSDP is no matrix any more.
    """
    return hasattr(parameter, "device_mesh") or parameter.dim() < 2


def _norms(gradient: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Largest entry and Euclidean norm, without a copy of the gradient."""
    g = gradient.detach()
    # Not vector_norm(ord=inf), which runs at a tenth of the memory's speed on the CPU.
    smallest, largest = torch.aminmax(g)
    linf = torch.maximum(-smallest, largest).float()
    l2 = torch.linalg.vector_norm(g, dtype=torch.float64 if g.dtype == torch.float64 else torch.float32)
    return (linf, l2) if scale is None else (linf / scale, l2 / scale)
