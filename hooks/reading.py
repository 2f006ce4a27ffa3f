"""The figures of one attention call: sums over rows, that micro-batches add to.

Everything stays on the model's device; nothing here waits for it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from entropy_monitor import measures
from entropy_monitor.hooks.calls import AttentionCall, fused_factors
from entropy_monitor.hooks.explain import bias_norm, steepest
from entropy_monitor.hooks.floors import floors
from entropy_monitor.hooks.head_sigmas import head_sigmas
from entropy_monitor.hooks.storage import version_of
from entropy_monitor.measures import RowStatistics

RowCount = int | Literal["all"]

FIGURES = (
    "rows_read",
    "entropy",
    "entropy_se",
    "max_entropy",
    "max_logit",
    "floor_row",
    "floor_activation",
    "floor_weights",
    "floor_paper",
    "sigma_q",
    "sigma_k",
    "sigma_qk",
)


class CallReading:
    """Figures of one call of one layer, over the micro-batches of one step.

    Args:
        call: the first of its calls in this step.
    """

    def __init__(self, call: AttentionCall) -> None:
        self.layer = call.layer
        self.call = call.call
        self.attention = call.attention
        self.heads = call.shape[1]
        self.first_head = call.first_head
        self._sigmas = head_sigmas(call)
        self._weights = _weight_versions(call)
        self._sums: Tensor | None = None
        self._max_logit: Tensor | None = None
        self.map: Tensor | None = None

    @torch.no_grad()
    def add(self, call: AttentionCall, rows: Tensor | None) -> None:
        """Add the rows of one forward; `rows` None reads all of them."""
        _, heads, tokens = call.shape
        if heads != self.heads:
            raise ValueError(f"{self.layer} had {self.heads} heads and now has {heads} within one step")
        if (versions := _weight_versions(call)) != self._weights:  # several steps within one `capture`
            self._sigmas, self._weights = head_sigmas(call), versions
        stats, scale = _statistics(call, rows)
        valid = (stats.num_keys > 0).to(stats.entropy.dtype)
        count = valid.sum((0, 2))
        figures = floors(call, rows, stats, scale, self._sigmas)
        per_row = (stats.entropy, stats.num_keys.clamp(min=1).log(), *(f.expand_as(valid) for f in figures))
        sums = [_total(figure, valid) for figure in per_row]
        error = measures.systematic_standard_error(stats.entropy, valid, tokens)
        new = torch.stack([count, sums[0], error * count, *sums[1:]]).float()
        top = stats.max_logit.amax((0, 2)).float()
        self._sums = new if self._sums is None else self._sums + new
        self._max_logit = top if self._max_logit is None else torch.maximum(self._max_logit, top)

    def figures(self) -> Tensor:
        """`[len(FIGURES), H]`, float32: means over the rows read; NaN = not known."""
        if self._sums is None or self._max_logit is None:
            raise ValueError(f"nothing was read for {self.layer}")
        count = self._sums[0]
        means = self._sums[1:] / count
        s = self._sigmas
        return torch.stack(
            [
                count,
                *means[:3],
                self._max_logit,
                *means[3:],
                *(x.to(count.device, torch.float32) for x in (s.sigma_q, s.sigma_k, s.sigma_qk)),
            ]
        )


def _weight_versions(call: AttentionCall) -> tuple[tuple[int, int], ...]:
    """Changes when a projection's weight does. A weight that is computed anew is told by its parameters."""
    versions: list[tuple[int, int]] = []
    for projection in (call.query, call.key):
        tensors = () if projection is None else projection.parameters or (projection.weight,)
        versions += [(id(tensor), version_of(tensor)) for tensor in tensors]
    return tuple(versions)


def _statistics(call: AttentionCall, rows: Tensor | None) -> tuple[RowStatistics, Tensor | None]:
    """Row statistics, and the factor of q·k, broadcast over `[B, H, R]`; None where that is not known."""
    i = call.inputs
    if call.weights is not None and call.logits is not None:
        return measures.row_statistics_from_weights(call.weights, call.logits, rows=rows), None
    if call.logits is not None:
        stats = measures.row_statistics_from_logits(call.logits, rows=rows)
        if i is None or i.scale is None:
            return stats, None
        stats = stats._replace(bias_norm=bias_norm(i, call.logits, rows))
    elif i is not None and isinstance(i.scale, float):
        factor, softcap = fused_factors(i)
        stats = measures.row_statistics(
            i.q,
            i.k,
            mask=i.mask,
            is_causal=i.is_causal,
            scale=factor,
            softcap=softcap,
            rows=rows,
            modify=i.modify,
        )
    else:
        raise ValueError(f"attention call of {call.layer}: neither logits nor all that makes them")
    scale = steepest(i)
    if scale is None:
        return stats, None
    if isinstance(scale, Tensor):
        return stats, scale.detach() if scale.dim() == 0 else scale.detach().squeeze(-1)
    # Filled on the device: a copy from the host would wait for it.
    return stats, torch.full((), scale, device=stats.entropy.device)


def _total(figure: Tensor, valid: Tensor) -> Tensor:
    """Sum over sequences and valid rows, `[H]`; a NaN in a valid row stays."""
    return torch.where(valid > 0, figure, 0.0).sum((0, 2))
