"""Rows that no softmax made, and logits that something else changes before their softmax."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from entropy_monitor import measures
from entropy_monitor.errors import ConfigurationError
from tests.measures.oracle import all_rows


def naive(weights: Tensor, logits: Tensor) -> list[tuple[float, int, float]]:
    out = []
    for w, u in zip(weights.flatten(0, 2).tolist(), logits.flatten(0, 2).tolist(), strict=True):
        total = math.fsum(w)
        seen = [x for x in u if x > -math.inf]
        p = [x / total for x in w] if total else []
        entropy = -math.fsum(x * math.log(x) for x in p if x > 0)
        out.append((entropy, len(seen) if total else 0, max(seen, default=-math.inf)))
    return out


@pytest.mark.parametrize("max_bytes", [2**26, 1])
def test_rows_are_divided_by_their_sums(max_bytes: int) -> None:
    logits = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    logits[0, 1, 2, 3:] = -math.inf
    logits[1, 0, 4] = -math.inf
    logits[1, 2, 0] = -1.0  # sees all keys, and attends to none
    weights = logits.relu() * 3
    stats = measures.row_statistics_from_weights(weights, logits, max_bytes=max_bytes)
    want = torch.tensor(naive(weights, logits), dtype=torch.float64).view(2, 3, 5, 3)
    torch.testing.assert_close(stats.entropy, want[..., 0])
    torch.testing.assert_close(stats.num_keys, want[..., 1])
    torch.testing.assert_close(stats.max_logit, want[..., 2])
    assert stats.logit_norm.isnan().all()
    assert stats.bias_norm.isnan().all()
    rows = torch.tensor([0, 3])
    some = measures.row_statistics_from_weights(weights, logits, rows=rows)
    assert torch.equal(some.entropy, stats.entropy[:, :, rows])


def test_weights_and_logits_must_fit() -> None:
    with pytest.raises(ConfigurationError, match="weights must be floating"):
        measures.row_statistics_from_weights(torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 2, 4))


@pytest.mark.parametrize("max_bytes", [2**26, 4096])
def test_modified_logits_are_told_their_place(max_bytes: int) -> None:
    q, k = torch.randn(2, 4, 9, 5), torch.randn(2, 2, 6, 5)
    bias = torch.randn(2, 4, 9, 6).masked_fill(torch.rand(2, 4, 9, 6) < 0.3, -torch.inf)
    added = torch.randn(9, 6)

    def modify(logits: Tensor, b: slice, h: slice, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        part = bias[b, h][:, :, rows]
        return logits + part, part == -torch.inf

    rows = torch.tensor([1, 4, 8])
    for chosen in (None, rows):
        stats = measures.row_statistics(
            q, k, modify=modify, mask=added, softcap=2.0, rows=chosen, max_bytes=max_bytes
        )
        want = all_rows(q, k, bias + added, softcap=2.0)
        for name in ("entropy", "num_keys", "max_logit", "logit_norm", "bias_norm"):
            expected = want[name] if chosen is None else want[name][:, :, rows]
            torch.testing.assert_close(getattr(stats, name).double(), expected, rtol=1e-4, atol=1e-5)
        maps = measures.attention_map(q, k, modify=modify, mask=added, softcap=2.0, rows=chosen)
        expected = want["probabilities"] if chosen is None else want["probabilities"][:, :, rows]
        torch.testing.assert_close(maps.double(), expected, rtol=1e-4, atol=1e-5)
