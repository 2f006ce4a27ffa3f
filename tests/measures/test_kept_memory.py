"""Memory that one call leaves to the next: what a call was run in must not show in those after it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from entropy_monitor.measures import _logits, _reduction, attention_map, row_statistics
from entropy_monitor.measures import row_statistics_from_logits as from_logits


class Subclass(Tensor):
    pass


def operands(tokens: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    q = torch.randn(2, 4, tokens, 16, generator=generator)
    return q, torch.randn(2, 2, tokens, 16, generator=generator)


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_logits, "_made", _logits.Scratch())
    monkeypatch.setattr(_reduction, "_exponentials", _logits.Scratch())


@pytest.mark.parametrize("context", [torch.inference_mode, FakeTensorMode])
def test_what_was_allocated_in_a_mode_serves_nobody_else(
    context: Callable[[], AbstractContextManager[object]],
) -> None:
    q, k = operands()
    want = row_statistics(q, k, is_causal=True).entropy.clone()
    with context():
        larger = operands(60)
        _logits._made.like(larger[0], (2, 4, 60, 60))
        _reduction._exponentials.like(larger[0], (2, 4, 60, 60))
        if context is not FakeTensorMode:
            row_statistics(*larger, is_causal=True)
    assert torch.equal(row_statistics(q, k, is_causal=True).entropy, want)
    assert row_statistics(*operands(60)).entropy.isfinite().all()


def test_what_a_subclass_allocated_serves_nobody_else() -> None:
    q, k = operands(60)
    got = row_statistics(q.as_subclass(Subclass), k.as_subclass(Subclass))
    assert type(row_statistics(*operands()).entropy) is Tensor
    assert _logits._made._memory is None or type(_logits._made._memory) is Tensor
    assert torch.equal(torch.Tensor(got.entropy), row_statistics(q, k).entropy)


def test_plain_memory_is_kept() -> None:
    q, k = operands()
    row_statistics(q, k)
    kept = _logits._made._memory
    assert kept is not None
    row_statistics(q, k)
    assert _logits._made._memory is kept


def test_what_modifies_logits_may_measure_itself() -> None:
    q, k = operands()

    def modify(logits: Tensor, *_: object) -> tuple[Tensor, None]:
        row_statistics(-3 * q, k)
        return logits, None

    assert torch.equal(row_statistics(q, k, modify=modify).entropy, row_statistics(q, k).entropy)


@pytest.mark.parametrize("whole", [True, False])
def test_modified_logits_may_be_someone_elses(whole: bool) -> None:
    q, k = operands()
    table = torch.randn(2, 4, 40, 40) if whole else torch.randn(40).expand(2, 4, 40, 40)
    before = table.clone()
    got = row_statistics(q, k, is_causal=True, modify=lambda x, b, h, r: (table[b, h], None))
    assert torch.equal(table, before)
    want = from_logits(table.masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf))
    torch.testing.assert_close(got.entropy, want.entropy)
    torch.testing.assert_close(got.logit_norm, want.logit_norm, rtol=1e-5, atol=1e-5)


def entropies(q: Tensor, k: Tensor) -> list[Tensor]:
    logits = q.detach() @ k.repeat_interleave(2, 1).mT
    tangents = q.sum() * logits  # of the logits, where q has some
    return [row_statistics(q, k).entropy, attention_map(q, k), from_logits(tangents).entropy]


def test_tangents_of_forward_differentiation_are_left_out() -> None:
    q, k = operands()
    want = entropies(q, k)
    with forward_ad.dual_level():
        got = entropies(forward_ad.make_dual(q, torch.ones_like(q)), k)
        assert all(forward_ad.unpack_dual(x).tangent is None for x in got)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)
    found: list[Tensor] = []

    def differentiated(x: Tensor) -> Tensor:
        found.extend(entropies(x, k))
        return x

    torch.func.jvp(differentiated, (q,), (torch.ones_like(q),))
    assert [x.shape for x in found] == [x.shape for x in want]


def test_rows_behind_all_keys_see_them_all() -> None:
    q, k = operands()
    rows = torch.tensor([7, 9, 15])
    got = row_statistics(q, k[:, :, :5], is_causal=True, rows=rows)
    torch.testing.assert_close(got.entropy, row_statistics(q, k[:, :, :5], rows=rows).entropy)
    assert (got.num_keys == 5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [2e38, 1e60, 1e150])
def test_hidden_keys_may_have_any_logits(dtype: torch.dtype, value: float) -> None:
    q, k = (x.to(dtype) for x in operands(6))
    q, k = q.abs(), torch.zeros_like(k)
    k[:, :, 4:, 0] = min(value, 1e38 if dtype == torch.float32 else value)
    seen = torch.arange(6) < 4
    # Of equal visible logits nothing but the largest one tells that a hidden one was among them.
    got = row_statistics(q, k, mask=seen, scale=4.0)
    torch.testing.assert_close(got.entropy, torch.full_like(got.entropy, 4.0).log())
    assert (got.max_logit == 0).all()
