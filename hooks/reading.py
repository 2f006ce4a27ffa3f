"""The figures of one attention call: sums over rows, that micro-batches add to.

Everything stays on the model's device; nothing here waits for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from entropy_monitor import measures
from entropy_monitor.hooks.calls import AttentionCall, fused_factors
from entropy_monitor.hooks.explain import bias_norm, steepest
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


@dataclass(frozen=True)
class HeadSigmas:
    """Spectral norms of each head's projections, `[H]` each; NaN where the projections are not known.

    Attributes:
        sigma_q: `‖W_Q,h‖₂`.
        sigma_k: `‖W_K,g(h)‖₂` of the key head that query head h uses.
        sigma_qk: `‖W_K,g(h) W_Q,hᵀ‖₂`.
        query_bias: `‖W_K,g(h) b_q,h‖₂`, 0 without a query bias.
    """

    sigma_q: Tensor
    sigma_k: Tensor
    sigma_qk: Tensor
    query_bias: Tensor


@torch.no_grad()
def head_sigmas(call: AttentionCall) -> HeadSigmas:
    """Spectral norms of the projections that made a call's q and k."""
    _, heads, _ = call.shape
    unknown = torch.full((heads,), math.nan, device=call.rows.device)
    q, k = call.query, call.key
    w_q = None if q is None or q.layout.heads != heads else q.head_weights()
    w_k = None if k is None or heads % k.layout.heads else k.head_weights()
    group = 1 if w_k is None else heads // w_k.shape[0]
    sigma_q = unknown if w_q is None else measures.largest_singular_value(w_q)
    sigma_k = unknown if w_k is None else measures.largest_singular_value(w_k).repeat_interleave(group)
    both = w_q is not None and w_k is not None and w_q.shape[-1] == w_k.shape[-1]
    if not both or q is None or w_q is None or w_k is None:
        return HeadSigmas(sigma_q, sigma_k, unknown, unknown)
    bias = q.head_biases()
    if bias is None:
        query_bias = torch.zeros_like(unknown)
    else:
        spread = w_k.repeat_interleave(group, dim=0) @ bias.unsqueeze(-1)
        query_bias = torch.linalg.vector_norm(spread.squeeze(-1), dim=-1)
    return HeadSigmas(sigma_q, sigma_k, measures.sigma_qk(w_q, w_k), query_bias)


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
        floors = _floors(call, rows, stats, scale, self._sigmas)
        per_row = (stats.entropy, stats.num_keys.clamp(min=1).log(), *floors)
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


def _floors(
    call: AttentionCall,
    rows: Tensor | None,
    stats: RowStatistics,
    scale: Tensor | None,
    sigmas: HeadSigmas,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row, activation, weight floors and the paper's curve, `[B, H, R]` each."""
    n = stats.num_keys
    unknown = torch.full_like(n, math.nan)
    if call.weights is not None:  # the theorem is about a softmax
        return unknown, unknown, unknown, unknown
    row = measures.floor_row(stats.logit_norm, n)
    paper = measures.floor_paper(sigmas.sigma_qk[:, None].to(n.device), n)
    i = call.inputs
    if i is None or scale is None:
        return row, unknown, unknown, paper
    group = i.q.shape[1] // i.k.shape[1]
    k_norm = measures.largest_singular_value(i.k).repeat_interleave(group, dim=1)[..., None]
    q_norm = torch.linalg.vector_norm(_take(i.q, rows).float(), dim=-1)
    activation = measures.floor_activation(scale, k_norm, q_norm, stats.bias_norm, n)
    weights = _weight_floor(call, rows, stats, scale, sigmas) if i.inner is None else None
    return row, activation, unknown if weights is None else weights, paper


def _weight_floor(
    call: AttentionCall,
    rows: Tensor | None,
    stats: RowStatistics,
    scale: Tensor,
    sigmas: HeadSigmas,
) -> Tensor | None:
    """The floor from weights and inputs; None where the projections or their inputs are not known."""
    if call.query is None or call.key is None or call.extra_keys:
        return None
    x_q, x_kv = call.query.inputs(), call.key.inputs()
    if x_q is None or x_kv is None:
        return None
    x_norm = torch.linalg.vector_norm(_take(x_q, rows, dim=1).float(), dim=-1)[:, None]
    x_kv_norm = measures.largest_singular_value(x_kv)[:, None, None]
    return measures.floor_weights(
        scale * (call.query.factor * call.key.factor),
        x_kv_norm,
        sigmas.sigma_qk[:, None],
        x_norm,
        sigmas.query_bias[:, None],
        stats.bias_norm,
        stats.num_keys,
    )


def _take(x: Tensor, rows: Tensor | None, dim: int = 2) -> Tensor:
    return x if rows is None else x.index_select(dim, rows)


def _total(figure: Tensor, valid: Tensor) -> Tensor:
    """Sum over sequences and valid rows, `[H]`; a NaN in a valid row stays."""
    return torch.where(valid > 0, figure, 0.0).sum((0, 2))
