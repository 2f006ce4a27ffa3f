"""Gradients and updates of the attention weights, read in the optimizer's own step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from entropy_monitor import measures
from entropy_monitor.guard import Guard
from entropy_monitor.hooks.calls import Role
from entropy_monitor.hooks.recorder import LayerParts

UPDATE_FIGURES = ("grad_linf", "grad_l2", "update_sigma", "update_entropy")
_UPDATED: tuple[Role, ...] = ("query", "key")


class WeightWatcher:
    """Reads, on measured steps, what an optimizer step does to each layer's attention weights.

    Gradients are those that the optimizer uses: after accumulation, unscaling and clipping. An update is the
    difference of the weights after and before the step.

    Args:
        optimizers: whose steps; a parameter may be in any of them.
        layers: what is known of each layer, filled by the recorder.
        guard: keeps faults of the reading from the training.
    """

    def __init__(
        self, optimizers: tuple[Optimizer, ...], layers: Mapping[str, LayerParts], guard: Guard
    ) -> None:
        self.armed = False
        self._layers = layers
        self._guard = guard
        self._gradients: dict[nn.Parameter, tuple[Tensor, Tensor]] = {}
        self._before: dict[tuple[str, Role], Tensor] = {}
        self._updates: dict[tuple[str, Role], Tensor] = {}
        self._handles: list[RemovableHandle] = []
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._pre_step))
            self._handles.append(optimizer.register_step_post_hook(self._post_step))

    def close(self) -> None:
        """Leave the optimizers as they were."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.forget()

    def forget(self) -> None:
        """Drop what was read, for the next measured step."""
        self._gradients.clear()
        self._before.clear()
        self._updates.clear()

    def _pre_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG002
        if self.armed:
            self._guard.run("reading gradients", self._read_before, optimizer)

    def _post_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG002
        if self.armed:
            self._guard.run("reading updates", self._read_after, optimizer)

    @torch.no_grad()
    def _read_before(self, optimizer: Optimizer) -> None:
        mine = _parameters(optimizer)
        scale = getattr(optimizer, "grad_scale", None)  # a fused step under GradScaler unscales inside
        for name, parts in self._layers.items():
            for role, part in parts.weights.items():
                parameter = part.parameter
                if parameter not in mine or parameter.grad is None or is_sharded(parameter):
                    continue
                if parameter not in self._gradients:
                    self._gradients[parameter] = _norms(parameter.grad, scale)
                if role in _UPDATED:
                    self._before[name, role] = part.matrix()

    @torch.no_grad()
    def _read_after(self, optimizer: Optimizer) -> None:
        mine = _parameters(optimizer)
        for (name, role), before in list(self._before.items()):
            part = self._layers[name].weights[role]
            if part.parameter in mine:
                self._updates[name, role] = part.matrix() - before
                del self._before[name, role]

    @torch.no_grad()
    def figures(self, layer: str, device: torch.device) -> Tensor:
        """`[len(UPDATE_FIGURES)]`, float32, of one layer; NaN = not known."""
        parts = self._layers[layer]
        unknown = torch.full((), math.nan, device=device)
        parameters = dict.fromkeys(part.parameter for part in parts.weights.values())
        norms = [self._gradients[p] for p in parameters if p in self._gradients]
        linf = torch.stack([n[0] for n in norms]).max() if norms else unknown
        l2 = torch.stack([n[1] for n in norms]).square().sum().sqrt() if norms else unknown
        updates = [u for role in _UPDATED if (u := self._updates.get((layer, role))) is not None]
        sigma, entropy = unknown, unknown
        if len(updates) == len(_UPDATED):
            sigma = torch.stack([measures.largest_singular_value(u) for u in updates]).max()
            if device.type == "cpu":  # eigenvalues would wait for an accelerator
                entropy = _joint_spectral_entropy(updates)
        return torch.stack([x.to(device, torch.float32) for x in (linf, l2, sigma, entropy)])


def _joint_spectral_entropy(updates: list[Tensor]) -> Tensor:
    """Spectral entropy of all singular values together, by the chain rule: `Σ w_i H_i - Σ w_i log w_i`."""
    energies = torch.stack([u.square().sum() for u in updates])
    shares = energies / energies.sum()
    own = torch.stack([measures.spectral_entropy(u) for u in updates])
    return torch.where(shares > 0, shares * own, 0.0).sum() + torch.special.entr(shares).sum()


def is_sharded(parameter: Tensor) -> bool:
    """Whether a process holds only part of a parameter: its norms would need a collective."""
    return type(parameter).__name__ == "DTensor" or hasattr(parameter, "device_mesh")


def _parameters(optimizer: Optimizer) -> set[Tensor]:
    return {p for group in optimizer.param_groups for p in group["params"]}


def _norms(gradient: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    g = gradient.detach().float()
    if scale is not None:
        g = g / scale
    return g.abs().max(), torch.linalg.vector_norm(g)
