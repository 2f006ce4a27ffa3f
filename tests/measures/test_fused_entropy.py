from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.measures import RowStatistics, fused_entropy, row_statistics
from entropy_monitor.measures.fused_entropy import fused_available, fused_row_entropy, supports_fused
from tests.measures import oracle
from tests.measures.cases import MASKS, B, H, Tk, Tq, additive, operands, pick

HIDING = [name for name in MASKS if not name.startswith(("biases", "window"))]
EXACT = 1e-3  # nats that no row may be off by


def truth(q: Tensor, k: Tensor, **options: Any) -> RowStatistics:
    """Float64; `test_rows.py` holds it against the oracle, which would take minutes at these lengths."""
    return row_statistics(q.double(), k.double(), **options)


def long_operands(tokens: int, spread: float, size: int = 32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    # The common offset of the keys is what softmax ignores and float32 has to carry.
    q, k = torch.randn(2, 4, tokens, size, generator=g), torch.randn(2, 2, tokens, size, generator=g) + 2
    return q * spread, k


def assert_norms(got: Tensor, want: Tensor, factor: float) -> None:
    assert (got.double() >= want).all()
    assert (got.double() <= want * factor + 1e-12).all()


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("name", HIDING)
def test_every_mask_that_hides_against_the_oracle(name: str, is_causal: bool) -> None:
    q, k = operands()
    m = MASKS[name]()
    got = fused_row_entropy(q, k, mask=m, is_causal=is_causal)
    want = oracle.all_rows(q, k, m, is_causal)
    torch.testing.assert_close(got.entropy.double(), want["entropy"], rtol=1e-4, atol=1e-5)
    assert torch.equal(got.num_keys.double(), want["num_keys"])
    assert torch.equal(got.bias_norm, torch.zeros_like(got.bias_norm))
    blind = want["num_keys"] == 0
    assert got.max_logit[~blind].isnan().all()
    assert (got.max_logit[blind] == -math.inf).all()
    known = m is None or (m.dim() == 4 and m.shape[1:3] == (1, 1)) or m.shape[-1] == 1
    if known:
        assert_norms(got.logit_norm, want["logit_norm"] * (want["num_keys"] > 1), 1.01)
    else:
        assert torch.equal(got.logit_norm.isnan(), want["num_keys"] > 1)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("spread", [0.1, 1.0, 8.0, 60.0, 1600.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_from_uniform_to_exploded_rows(spread: float, is_causal: bool, dtype: torch.dtype) -> None:
    q, k = (x.to(dtype) for x in long_operands(150, spread))
    got, want = fused_row_entropy(q, k, is_causal=is_causal), truth(q, k, is_causal=is_causal)
    assert {x.dtype for x in got} == {torch.float64 if dtype == torch.float64 else torch.float32}
    assert (got.entropy - want.entropy).abs().max() < 1e-4
    several = want.entropy > 1e-30
    off = (got.entropy - want.entropy).abs()[several] / want.entropy[several]
    assert off.max() < 0.01
    assert (want.max_logit.max() > 1e4) == (spread == 1600.0)
    seen = want.num_keys > 1
    assert (got.logit_norm[seen] >= want.logit_norm[seen]).all()
    ratio = got.logit_norm[seen] / want.logit_norm[seen]
    assert ratio.median() < 1 + 3e-4
    # Two or three keys can all lie across a query: rounding then is a larger part of what is left.
    assert ratio[want.num_keys[seen] > 10].max() < 1.01


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True, "mask": pick(2, 1, 1, 300)},
        {"mask": pick(2, 1, 1, 300)},
        {"mask": pick(2, 4, 300, 300)},
        {"mask": pick(300, 300), "is_causal": True},
        {"is_causal": True, "scale": -0.4},
        {"scale": 0.0},
        {"is_causal": True, "max_bytes": 1},
        {"max_bytes": 400_000},
    ],
    ids=["causal_padding", "padding", "any", "causal_any", "negative", "zero", "cut", "cut_less"],
)
def test_options_over_several_chunks(options: dict[str, Any]) -> None:
    q, k = long_operands(300, 2.0)
    got, want = fused_row_entropy(q, k, **options), truth(q, k, **options)
    assert (got.entropy - want.entropy).abs().max() < EXACT / 10
    assert torch.equal(got.num_keys.double(), want.num_keys)
    if options.get("scale") == 0.0:
        assert (got.logit_norm == 0).all()
    elif "mask" not in options or (options["mask"].dim() == 4 and options["mask"].shape[1] == 1):
        seen = want.num_keys > 10
        assert (got.logit_norm >= want.logit_norm * (want.num_keys > 1)).all()
        assert (got.logit_norm[seen] < want.logit_norm[seen] * 1.01).all()


@pytest.mark.parametrize(("rows", "keys"), [(70, 290), (290, 70), (1, 200), (200, 1), (128, 128), (129, 257)])
def test_causal_cross_attention(rows: int, keys: int) -> None:
    q, k = long_operands(300, 1.0)
    q, k = q[:, :, :rows], k[:, :, :keys]
    got, want = fused_row_entropy(q, k, is_causal=True), truth(q, k, is_causal=True)
    assert (got.entropy - want.entropy).abs().max() < EXACT / 10
    assert torch.equal(got.num_keys.double(), want.num_keys)
    assert (got.logit_norm >= want.logit_norm * (want.num_keys > 1)).all()
    many = want.num_keys > 10
    assert (got.logit_norm[many] < want.logit_norm[many] * 1.01).all()


@pytest.mark.parametrize("gap", [5.0, 12.0, 16.0, 30.0])
@pytest.mark.parametrize("height", [1.0, 1e4])
def test_peaked_rows(gap: float, height: float) -> None:
    # Keys are the identity: the row's logits are q itself, known to the last bit.
    u = torch.full((1, 1, 4, 32), -gap)
    u[..., 3] = 0.0
    got = fused_row_entropy(u + height, torch.eye(32)[None, None], scale=1.0).entropy.double()
    want = truth(u + height, torch.eye(32)[None, None], scale=1.0).entropy
    assert (want.max() < 1e-6) == (gap > 16)
    torch.testing.assert_close(got, want, rtol=1e-2, atol=0)


def test_the_worst_rows_of_each_head_are_right_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_entropy, "_again_where_needed", fused_entropy._again_the_worst)
    q, k = long_operands(300, 1.0)
    q[:, 1, 7:20] *= 300  # more than float32 can cancel, in fewer rows than are computed again
    keep = pick(2, 4, 300, 300)
    keep[0, 0, 5] = False
    for options in ({"is_causal": True}, {"mask": keep}, {"mask": pick(2, 1, 1, 300), "is_causal": True}, {}):
        got, want = fused_row_entropy(q, k, **options), truth(q, k, **options)
        assert (got.entropy - want.entropy).abs().max() < 2e-5
        sharp = got.entropy[:, 1, 7:20]
        torch.testing.assert_close(sharp.double(), want.entropy[:, 1, 7:20], rtol=1e-6, atol=1e-30)


def test_without_rows_computed_again_exploded_rows_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_entropy, "_again_where_needed", lambda *_: None)
    q, k = long_operands(300, 1600.0)
    assert (fused_row_entropy(q, k).entropy - truth(q, k).entropy).abs().max() > EXACT


def test_memory_layout_does_not_matter() -> None:
    q, k = long_operands(70, 1.0)
    want = fused_row_entropy(q, k, is_causal=True)
    features_first = (q.mT.contiguous().mT, k.mT.contiguous().mT)
    tokens_first = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    for a, b in (features_first, tokens_first, (q, k.repeat_interleave(2, 3)[..., ::2])):
        got = fused_row_entropy(a, b, is_causal=True)
        torch.testing.assert_close(got.entropy, want.entropy, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got.logit_norm, want.logit_norm, rtol=1e-4, atol=1e-5)


def test_entropies_stay_between_zero_and_log_n() -> None:
    q, k = long_operands(300, 1.0)
    k = k[:, :, :1].expand(-1, -1, 300, -1).contiguous()  # all keys alike: entropy is log n to the last bit
    got = fused_row_entropy(q, k, is_causal=True)
    assert (got.entropy <= got.num_keys.log()).all()
    assert (got.entropy >= 0).all()
    torch.testing.assert_close(got.entropy, got.num_keys.log(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_keys_that_are_not_finite(bad: float) -> None:
    q, k = operands()
    k[0, 0, 5] = bad
    got = fused_row_entropy(q, k, is_causal=True).entropy
    want = row_statistics(q, k, is_causal=True).entropy
    assert torch.equal(got.isnan(), want.isnan())
    assert want.isnan().any()
    seen = torch.ones(B, 1, 1, Tk, dtype=torch.bool)
    seen[0, ..., 5] = False
    hidden = fused_row_entropy(q, k, mask=seen)
    for values in (hidden.entropy, hidden.logit_norm):
        assert values.isfinite().all()
    torch.testing.assert_close(hidden.entropy, row_statistics(q, k, mask=seen).entropy, rtol=1e-4, atol=1e-5)


def test_nothing_waits_for_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    # Meta tensors hold no values, and have the operator of CUDA: whatever would wait raises on them.
    monkeypatch.setitem(fused_entropy._OPERATORS, "meta", fused_entropy._OPERATORS["cuda"])
    q, k = (x.to("meta") for x in long_operands(150, 1.0, size=30))
    for m in (None, pick(2, 1, 1, 150), pick(150, 150), pick(2, 4, 150, 1)):
        mask = None if m is None else m.to("meta")
        for is_causal in (False, True):
            assert supports_fused(q, k, mask, is_causal)
            got = fused_row_entropy(q, k, mask=mask, is_causal=is_causal)
            assert {(x.shape, x.device.type) for x in got} == {((2, 4, 150), "meta")}
    assert not supports_fused(q, k, torch.zeros(150, 150, device="meta"))
    assert not supports_fused(q.double(), k)


def test_without_gradient_autocast_or_change_of_the_random_state() -> None:
    q, k = (x.requires_grad_() for x in operands())
    before = torch.get_rng_state()
    plain = fused_row_entropy(q, k, is_causal=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fused_row_entropy(q, k, is_causal=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(x.requires_grad for x in plain)
    for a, b in zip(plain, inside, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_products_that_round_do_not_matter() -> None:
    q, k = long_operands(150, 1.0)
    want = fused_row_entropy(q, k, is_causal=True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        got = fused_row_entropy(q, k, is_causal=True)
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(got.entropy, want.entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.logit_norm, want.logit_norm, rtol=1e-4, atol=1e-5)


def test_what_is_supported() -> None:
    q, k = operands()
    assert fused_available(q.device)
    assert not fused_available(torch.device("mps"))
    assert supports_fused(q, k)
    assert supports_fused(q, k, pick(Tq, Tk), True)
    assert supports_fused(q, k, additive(pick(Tq, Tk), -math.inf))
    assert supports_fused(q, k, additive(pick(Tq, Tk), -1e4))
    for name in ("biases", "biases_and_hidden", "window_minus_100"):
        assert not supports_fused(q, k, MASKS[name]())
    assert not supports_fused(q, k, None, softcap=3.0)
    assert not supports_fused(q, k, modify=lambda logits, *_: (logits, None))
    assert not supports_fused(q[0], k)
    assert not supports_fused(q, k[:, :, :0])


def test_what_does_not_fit_is_refused() -> None:
    q, k = operands()
    with pytest.raises(ConfigurationError, match="the mask adds biases; use row_statistics"):
        fused_row_entropy(q, k, mask=torch.randn(Tq, Tk))
    with pytest.raises(ConfigurationError, match="does not broadcast"):
        fused_row_entropy(q, k, mask=pick(H, 5, Tk))
    with pytest.raises(ConfigurationError, match="must agree in batch and head size"):
        fused_row_entropy(q, k[..., :5])
    with pytest.raises(ConfigurationError, match="a size is 0"):
        fused_row_entropy(q[:, :, :0], k)
