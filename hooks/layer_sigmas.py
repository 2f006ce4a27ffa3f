"""Spectral norms of the whole W_Q, W_K, W_V and W_O, followed from one measured step to the next."""

from __future__ import annotations

import torch
from torch import Tensor

from entropy_monitor import measures
from entropy_monitor.hooks.calls import Role


class LayerSigmas:
    """The largest singular value of each layer's weights, from below: it informs, and no floor rests on it.

    Each weight's leading vectors are kept (5 columns), so that the next look costs a pass or two over the
    weight; see `measures.leading_singular_value` for the accuracy.
    """

    def __init__(self) -> None:
        self._vectors: dict[tuple[str, Role], Tensor] = {}
        self._looks = 0

    @torch.no_grad()
    def sigma(self, layer: str, role: Role, matrix: Tensor) -> Tensor:
        """The spectral norm of one weight.

        Args:
            layer: whose.
            role: which of its weights.
            matrix: `[m, n]`, any floating dtype and strides.

        Returns:
            0-dim, float32 (float64 for float64), on the matrix's device; NaN where it is not finite.
        """
        place = (layer, role)
        self._looks += 1
        sigma, vectors = measures.leading_singular_value(matrix, self._vectors.get(place), self._looks)
        # A weight that begins at zero, or is not finite, leaves no vectors to follow.
        if matrix.device.type == "cpu" and not bool(sigma > 0):
            self.forget(layer, role)
        else:
            self._vectors[place] = vectors
        return sigma

    def forget(self, layer: str, role: Role) -> None:
        """What was taken for this weight was not it."""
        self._vectors.pop((layer, role), None)
