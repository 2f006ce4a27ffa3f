"""The figures of one attention call: sums over rows, that micro-batches add to.

Everything stays on the model's device; nothing here waits for it.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from entropy_monitor import measures
from entropy_monitor.hooks.calls import AttentionCall
from entropy_monitor.hooks.floors import floors
from entropy_monitor.hooks.head_sigmas import HeadSigmas
from entropy_monitor.hooks.statistics import read
from entropy_monitor.measures.sampling import ALLOWANCE

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
        self._sigmas: HeadSigmas | None = None
        self._sums: Tensor | None = None
        self._strata: dict[int, _Strata] = {}  # by how many there are
        self._max_logit: Tensor | None = None
        self.map: Tensor | None = None
        self.how = ""

    @torch.no_grad()
    def add(self, call: AttentionCall, rows: Tensor | None, sigmas: HeadSigmas | None) -> None:
        """Add the rows of one forward.

        Args:
            call: the call.
            rows: which, `[R]`; None reads all of them.
            sigmas: of its weights; without them floors that rest on norms are not computed either.
        """
        _, heads, tokens = call.shape
        if heads != self.heads:
            raise ValueError(f"{self.layer} had {self.heads} heads and now has {heads} within one step")
        self._sigmas = sigmas
        stats, scale, self.how = read(call, rows)
        valid = (stats.num_keys > 0).to(stats.entropy.dtype)
        count = valid.sum((0, 2))
        figures = floors(call, rows, stats, scale, sigmas)
        per_row = (stats.entropy, stats.num_keys.clamp(min=1).log(), *(f.expand_as(valid) for f in figures))
        # Over sequences and valid rows; a NaN in a valid row stays. Each stands for those that were not read.
        stands_for = tokens / max(1, valid.shape[-1])
        weight = count * stands_for
        sums = torch.where(valid > 0, torch.stack(per_row), 0.0).sum((1, 3)) * stands_for
        if valid.shape[-1] < tokens:
            strata = self._strata.setdefault(valid.shape[-1], _Strata())
            strata.add(stats.entropy, valid, tokens)
        new = torch.cat([torch.stack([count, weight]), sums]).float()
        top = stats.max_logit.amax((0, 2)).float()
        self._sums = new if self._sums is None else self._sums + new
        self._max_logit = top if self._max_logit is None else torch.maximum(self._max_logit, top)

    def figures(self) -> Tensor:
        """`[len(FIGURES), H]`, float32: means over the rows read; NaN = not known."""
        if self._sums is None or self._max_logit is None:
            raise ValueError(f"nothing was read for {self.layer}")
        count, weight = self._sums[:2]
        means = self._sums[2:] / weight
        s = self._sigmas or HeadSigmas(*(torch.full_like(count, math.nan),) * 4)
        return torch.stack(
            [
                count,
                means[0],
                self._error(weight),
                means[1],
                self._max_logit,
                *means[2:],
                *(x.to(count.device, torch.float32) for x in (s.sigma_q, s.sigma_k, s.sigma_qk)),
            ]
        )

    def _error(self, weight: Tensor) -> Tensor:
        """The standard error of the mean entropy, `[H]`.

        Micro-batches read at the same places count as one large batch; those read at others, since their
        number of rows is another, as independent of them.
        """
        if not self._strata:  # all rows were read
            return torch.zeros_like(weight)
        errors = torch.stack([strata.error() for strata in self._strata.values()])
        error: Tensor = torch.linalg.vector_norm(errors, dim=0)
        return error.float() / weight


class _Strata:
    """Entropies by stratum, over the micro-batches in which as many rows of a sequence were read.

    The rows lie at the same places in each of them, relative to its length: errors that come from the places
    are common to all.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._read = 0
        self._rows = 0

    def add(self, entropy: Tensor, valid: Tensor, tokens: int) -> None:
        """Add what was read of one micro-batch, `[B, H, R]` of `tokens` rows."""
        sums = measures.stratum_sums(entropy, valid) * (tokens / entropy.shape[-1])
        self._sums = sums if self._sums is None else self._sums + sums
        batch, _, read = entropy.shape
        self._read += batch * read
        self._rows += batch * tokens

    def error(self) -> Tensor:
        """The standard error of the sum of entropies over all rows, `[H]`; 0 where no row was valid."""
        if self._sums is None:
            raise ValueError("nothing was read")
        weight, share = self._sums[0].sum(-1), self._read / self._rows
        # A row that was read stands for 1 / share of them, and so does one that was missed.
        error = measures.standard_error_of_sums(self._sums, share, ALLOWANCE / share)
        return torch.where(weight > 0, error * weight, 0.0)
