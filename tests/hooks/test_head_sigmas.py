"""When norms of heads are computed again, and when not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import entropy_monitor as em
from entropy_monitor.hooks import head_sigmas as module
from entropy_monitor.hooks.calls import AttentionCall, Inputs
from entropy_monitor.hooks.head_sigmas import HeadSigmaCache, head_sigmas
from entropy_monitor.hooks.projections import Layout, Projection
from tests.training import TOKENS, WIDTH, FusedAttention, SeparateAttention, tiny


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


@pytest.mark.parametrize("attention", [SeparateAttention, FusedAttention])
def test_micro_batches_compute_norms_once(
    attention: type[nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, computed = tiny(attention), []
    assert any(name.endswith("bias") for name, _ in model.named_parameters())
    monkeypatch.setattr(module, "head_sigmas", lambda call: computed.append(call.layer) or head_sigmas(call))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = em.EntropyMonitor(model, optimizer=optimizer, run_dir=tmp_path, every=1, rows="all")
    layers = set()
    for step in range(3):
        for _ in range(4):
            model(torch.randn(2, TOKENS, WIDTH)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.step()
        layers = set(computed)
        assert len(computed) == (step + 1) * len(layers)
    monitor.close()
    assert layers


def test_a_bias_written_within_a_step_is_seen_and_another_in_its_memory_is_another() -> None:
    q, k, cache = nn.Linear(8, 8), nn.Linear(8, 8), HeadSigmaCache()

    def call() -> AttentionCall:
        made = call_of(q, k)
        assert made.query is not None
        query = replace(made.query, bias=q.bias.detach())  # a new alias in each forward
        return replace(made, query=query)

    first = cache.of(call())
    assert cache.of(call()) is first
    with torch.no_grad():
        q.bias.mul_(2)
    torch.testing.assert_close(cache.of(call()).query_bias, 2 * first.query_bias)
    with torch.no_grad():
        q.bias = nn.Parameter(3 * q.bias)
    torch.testing.assert_close(cache.of(call()).query_bias, 6 * first.query_bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
def test_a_change_anywhere_in_a_weight_is_seen(dtype: torch.dtype, fused: bool) -> None:
    torch.manual_seed(0)
    H, D = 4, 32
    weight = nn.Parameter(torch.randn(2 * H * D if fused else H * D, H * D).to(dtype))
    other = weight if fused else nn.Parameter(torch.randn(H * D, H * D).to(dtype))
    made = [
        Projection(w.detach(), None, Layout(H, D, base, D), None, None, parameters=(w,))
        for w, base in ((weight, 0), (other, H * D if fused else 0))
    ]
    heads = torch.zeros(1, H, 3, D)
    call = AttentionCall("a", 0, "sdpa", Inputs(heads, heads), None, made[0], made[1])
    for w, row, column in ((weight, 5, 7), (weight, 127, 127), (other, 3, 1), (other, 126, 101)):
        cache = HeadSigmaCache()
        first = cache.of(call)
        cache.begin()
        assert cache.of(call) is first
        cache.begin()
        w.data[row - H * D * (fused and w is other), column] += 3
        assert cache.of(call) is not first
    cache = HeadSigmaCache()
    first = cache.of(call)
    cache.begin()
    weight.data[:, [33, 35]] = weight.data[:, [35, 33]]  # whose sums are the same
    assert cache.of(call) is not first
