"""Spectral norms of the whole W_Q, W_K, W_V and W_O, followed from one measured step to the next."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_monitor import measures
from entropy_monitor.hooks.calls import Role


class LayerSigmas:
    """The largest singular value of each layer's weights, from below: no floor may rest on them.

    Each weight's leading vectors are kept (4 columns), so that the next look costs few passes over it;
    see `measures.leading_singular_value` for the accuracy. A look at other micro-batches of the same step
    costs nothing.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, Role], _Kept] = {}

    def begin(self) -> None:
        """A new step: weights may have changed, whatever their versions say (some write through `.data`)."""
        for kept in self._kept.values():
            kept.versions = None

    @torch.no_grad()
    def sigma(self, layer: str, role: Role, matrix: Tensor, versions: Hashable) -> Tensor:
        """The spectral norm of one weight.

        Args:
            layer: whose.
            role: which of its weights.
            matrix: `[m, n]`, any floating dtype and strides.
            versions: changes when the weight does; not None.

        Returns:
            0-dim, float32 (float64 for float64), on the matrix's device; NaN where it is not finite.
        """
        kept = self._kept.get((layer, role))
        if kept is not None and kept.versions == versions and kept.device == matrix.device:
            return kept.sigma
        start = None if kept is None else kept.vectors
        sigma, vectors = measures.leading_singular_value(matrix, start)
        # A weight that begins at zero, or is not finite, leaves no vectors to follow.
        lost = matrix.device.type == "cpu" and not bool(sigma > 0)
        self._kept[layer, role] = _Kept(sigma, None if lost else vectors, versions, matrix.device)
        return sigma

    def forget(self, layer: str, role: Role) -> None:
        """What was taken for this weight was not it."""
        self._kept.pop((layer, role), None)


@dataclass
class _Kept:
    """What is known of one weight."""

    sigma: Tensor
    vectors: Tensor | None
    versions: Hashable | None
    device: torch.device
