"""Corners of plain PyTorch that look ordinary and are not: each once gave a wrong figure or none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import entropy_monitor as em


class Attention(nn.Module):
    """Separate projections around whatever `attend(module, x)` does."""

    def __init__(self, attend: Callable[[Attention, Tensor], Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))
        self.latents = nn.Parameter(torch.randn(1, 5, 32))
        self.a, self.b = nn.Linear(32, 4, bias=False), nn.Linear(4, 32, bias=False)
        self.attend = attend

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (4, 8)).transpose(-3, -2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(self, x)


def dense(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Entropy of each head, float64."""
    p = (q.double() @ k.double().transpose(-1, -2) * scale).softmax(-1)
    return torch.special.entr(p).sum(-1).mean((0, 2))


@pytest.mark.parametrize("scale", [1, torch.tensor(0.5)], ids=["int", "tensor"])
def test_sdpa_takes_any_number_as_scale(scale: float) -> None:
    m = Attention(
        lambda m, x: F.scaled_dot_product_attention(*(m.heads(f(x)) for f in (m.q, m.k, m.v)), scale=scale)
    )
    x = torch.randn(3, 6, 32)
    table = em.measure(m, x)
    want = dense(m.heads(m.q(x)), m.heads(m.k(x)), float(scale))
    torch.testing.assert_close(torch.tensor(table["entropy"]).double(), want, rtol=1e-5, atol=1e-5)


def test_one_sequence_of_queries_serves_a_batch_of_keys() -> None:
    def attend(m: Attention, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(m.heads(m.q(m.latents)), m.heads(m.k(x)), m.heads(m.v(x)))

    m, x = Attention(attend), torch.randn(3, 9, 32)
    table = em.measure(m, x)
    want = dense(m.heads(m.q(m.latents)).expand(3, -1, -1, -1), m.heads(m.k(x)), 8**-0.5)
    torch.testing.assert_close(torch.tensor(table["entropy"]).double(), want, rtol=1e-5, atol=1e-5)
    assert (table["rows_read"] == 15).all()


def test_a_low_rank_sum_by_addmm_is_no_projection() -> None:
    def attend(m: Attention, x: Tensor) -> Tensor:
        q = torch.addmm(m.q(x).flatten(0, 1), m.a(x).flatten(0, 1), m.b.weight.t()).view_as(x)
        return F.scaled_dot_product_attention(m.heads(q), m.heads(m.k(x)), m.heads(m.v(x)))

    for shape in ((2, 6, 32), (8, 64, 32)):
        table = em.measure(Attention(attend), torch.randn(shape))
        assert table[["sigma_q", "sigma_qk", "floor_paper", "floor_weights"]].isna().all().all()
        assert table["floor_activation"].notna().all()


def test_an_input_that_is_written_over_bounds_nothing() -> None:
    def attend(m: Attention, x: Tensor) -> Tensor:
        q, k, v = (m.heads(f(x)) for f in (m.q, m.k, m.v))
        x.mul_(1e-3)
        return F.scaled_dot_product_attention(30 * q, k, v)

    table = em.measure(Attention(attend), torch.randn(3, 6, 32))
    assert table["floor_weights"].isna().all()
    assert table["sigma_qk"].notna().all()


def test_weights_that_change_within_one_capture() -> None:
    m = Attention(lambda m, x: F.scaled_dot_product_attention(*(m.heads(f(x)) for f in (m.q, m.k, m.v))))
    x = torch.randn(3, 6, 32)
    with em.capture(m) as seen:
        m(x)
        before = seen.heads["sigma_qk"]
        with torch.no_grad():
            m.q.weight.mul_(3000)
        m(x)
    after = seen.heads
    assert (after["sigma_qk"] > 1000 * before).all()
    assert (after["floor_weights"] <= after["entropy"] + 1e-4).all()


def test_what_attention_returns_comes_from_no_projection() -> None:
    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            h = x.unflatten(-1, (4, 8)).transpose(1, 2)
            return x + F.scaled_dot_product_attention(h, h, h).transpose(1, 2).flatten(2)

    model = nn.Sequential(nn.Linear(32, 32), Block(), Block())
    table = em.measure(model, torch.randn(3, 6, 32))
    assert table.loc[table["layer"] == "2", "sigma_qk"].isna().all()
    assert "2" in set(table["layer"])


def test_what_a_mask_hides_is_told_by_the_mask_itself() -> None:
    m = nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 6, 32)
    causal = torch.zeros(6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), -1e4)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    table = em.measure(m, x, x, x, attn_mask=causal, key_padding_mask=padding)
    counts = torch.stack([torch.arange(1, 7), torch.arange(1, 7).clamp(max=4)])
    want = counts.double().log().mean()
    torch.testing.assert_close(
        torch.tensor(table["max_entropy"]).double(), want.expand(4), rtol=1e-5, atol=1e-5
    )
