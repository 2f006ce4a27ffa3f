from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import entropy_monitor as em
from entropy_monitor.remedies.qk_clip.scaling import qk_clip_, split_factors


def test_the_core_on_weights_alone() -> None:
    q, k = torch.randn(4, 8, 3, dtype=torch.float64), torch.randn(2, 8, 3, dtype=torch.float64)
    b, c = torch.randn(4, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    x = torch.randn(9, 8, dtype=torch.float64)
    old = q.clone(), k.clone(), b.clone(), c.clone()

    def logits(q: Tensor, k: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return (x @ q + b[:, None]) @ (x @ k + c[:, None]).repeat_interleave(2, 0).mT

    eta = torch.tensor([0.2, 1.0, 0.5, 0.3], dtype=torch.float64)
    qk_clip_(q, k, eta, query_bias=b, key_bias=c)
    assert torch.allclose(logits(q, k, b, c), logits(*old) * eta.view(4, 1, 1), rtol=1e-12)
    assert torch.equal(k[0], old[1][0])
    assert torch.equal(q[1], old[0][1])
    assert torch.allclose(k[1], old[1][1] * math.sqrt(0.5), rtol=1e-12)
    with pytest.raises(em.ConfigurationError, match=r"factors must be 4 numbers in \(0, 1\].*got \[2\.0"):
        qk_clip_(q, k, torch.full((4,), 2.0))
    with pytest.raises(em.ConfigurationError, match="divide that of query heads, got 3 and 4"):
        qk_clip_(q, torch.randn(3, 8, 3), eta)


def test_a_plain_head_takes_the_square_root_on_each_side() -> None:
    of_query, of_key = split_factors(torch.tensor([0.25, 1.0]), 2, 0.5)
    assert of_query.tolist() == [0.5, 1.0] == of_key.tolist()


def weights(heads: int, size: int = 3) -> Tensor:
    return torch.randn(heads, 8, size)


HALF = torch.full((4,), 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factors": [0.5] * 4}, r"factors must be 4 numbers .*, got list; give a tensor of shape \(4,\)"),
        ({"factors": torch.ones(3)}, r"factors must be 4 numbers .*, got shape \(3,\)"),
        ({"factors": torch.ones(4, 1)}, r"got shape \(4, 1\)"),
        ({"factors": torch.tensor([0.5, math.nan, 0.5, 0.5])}, r"got \[0.5, nan"),
        ({"query": None}, r"query must be a tensor \[H, d_model, d_head\], got None"),
        ({"query": "q"}, "query must be a floating-point tensor, got str"),
        ({"query": torch.ones(4, 8, 3, dtype=torch.long)}, "floating-point tensor, got torch.int64"),
        ({"query": torch.ones(8, 12)}, r"query must be \[heads, d_model, d_head\], got shape \(8, 12\)"),
        ({"key": torch.ones(8, 6)}, r"key must be \[heads, d_model, d_head\], got shape \(8, 6\)"),
        ({"key": weights(2, 5)}, "query and key must have the same d_head, got 3 and 5"),
        ({"key": None}, "key_bias without key"),
        ({"query_bias": torch.ones(12)}, r"query_bias must be .*\(4, 3\) for this query, got shape \(12,\)"),
        ({"key_bias": torch.ones(4, 3)}, r"key_bias must be .*\(2, 3\) for this key, got shape \(4, 3\)"),
        ({"key": weights(1).expand(2, 8, 3)}, "key is expanded: several of its entries are one number"),
        ({"balance": 2}, "balance is the queries' share"),
    ],
)
def test_wrong_input_writes_nothing(change: dict[str, Any], message: str) -> None:
    arguments = {
        "query": weights(4),
        "key": weights(2),
        "factors": HALF,
        "query_bias": torch.ones(4, 3),
        "key_bias": torch.ones(2, 3),
    } | change
    old = {n: x.clone() for n, x in arguments.items() if isinstance(x, Tensor)}
    with pytest.raises(em.ConfigurationError, match=message):
        qk_clip_(**arguments)
    assert all(torch.equal(arguments[n], x) or n == "factors" for n, x in old.items())


def test_weights_that_share_memory_are_refused() -> None:
    both = weights(6)
    old = both.clone()
    for query, key in ((both[:4], both[:4]), (both[:4], both[2:4]), (both[:4], both[3:5])):
        with pytest.raises(em.ConfigurationError, match="query and key share memory, and would be scaled"):
            qk_clip_(query, key, HALF)
    bias = torch.ones(4, 3)
    with pytest.raises(em.ConfigurationError, match="query_bias and key_bias share memory"):
        qk_clip_(both[:4], both[4:], HALF, query_bias=bias, key_bias=bias[:2])
    assert torch.equal(both, old)


@pytest.mark.parametrize("interleaved", [False, True])
def test_parts_of_one_fused_weight_are_scaled_each(interleaved: bool) -> None:
    linear = nn.Linear(8, 24)
    old = linear.weight.detach().clone()
    shape = (4, 2, 3) if interleaved else (2, 4, 3)
    query, key = linear.weight.unflatten(0, shape).movedim(-1, -2).unbind(1 if interleaved else 0)
    qk_clip_(query, key, torch.full((4,), 0.25))
    assert torch.allclose(linear.weight, old / 2)


def test_queries_alone_take_all_of_the_factor() -> None:
    query = weights(4)
    old = query.clone()
    qk_clip_(query, None, HALF)
    assert torch.equal(query, old / 2)
