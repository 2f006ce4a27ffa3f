"""When norms of heads are computed again, and when not."""

from __future__ import annotations

import torch
from torch import nn

from entropy_monitor.hooks.calls import AttentionCall, Inputs
from entropy_monitor.hooks.head_sigmas import HeadSigmaCache, head_sigmas
from entropy_monitor.hooks.projections import Layout, Projection


def call_of(q: nn.Linear, k: nn.Linear, number: int = 0, sharded: bool = False) -> AttentionCall:
    heads = torch.zeros(1, 2, 3, 4)
    made = [
        Projection(m.weight, m.bias, Layout(2, 4, 0, 4), None, None, parameters=(m.weight,)) for m in (q, k)
    ]
    inputs = Inputs(heads, heads)
    return AttentionCall("a", number, "sdpa", inputs, None, made[0], made[1], sharded=sharded)


def test_unchanged_weights_are_not_computed_again_and_changed_ones_are() -> None:
    q, k, cache = nn.Linear(8, 8), nn.Linear(8, 8), HeadSigmaCache()
    first = cache.of(call_of(q, k))
    assert cache.of(call_of(q, k)) is first
    assert cache.of(call_of(q, k, number=1)) is first
    cache.begin()
    assert cache.of(call_of(q, k)) is first
    with torch.no_grad():
        q.weight.mul_(2)  # a step within the step
    second = cache.of(call_of(q, k))
    torch.testing.assert_close(second.sigma_q, 2 * first.sigma_q)
    cache.begin()
    q.weight.data.mul_(2)  # which no version tells
    third = cache.of(call_of(q, k))
    torch.testing.assert_close(third.sigma_qk, 4 * first.sigma_qk, rtol=1e-3, atol=0)
    cache.begin()
    q.bias.data.mul_(2)
    torch.testing.assert_close(cache.of(call_of(q, k)).query_bias, 2 * third.query_bias)


def test_sharded_weights_are_computed_at_every_step() -> None:
    q, k, cache = nn.Linear(8, 8), nn.Linear(8, 8), HeadSigmaCache()
    first = cache.of(call_of(q, k, sharded=True))
    assert cache.of(call_of(q, k, sharded=True)) is first
    cache.begin()
    assert cache.of(call_of(q, k, sharded=True)) is not first


def test_other_weights_in_the_same_place_are_others() -> None:
    q, k, cache = nn.Linear(8, 8), nn.Linear(8, 8), HeadSigmaCache()
    cache.of(call_of(q, k))
    other = nn.Linear(8, 8)
    got, want = cache.of(call_of(other, k)), head_sigmas(call_of(other, k))
    assert torch.equal(got.sigma_qk, want.sigma_qk)
