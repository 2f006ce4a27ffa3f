from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.measures import (
    RowStatistics,
    attention_entropy,
    attention_map,
    entropy_from_maps,
    row_statistics,
    row_statistics_from_logits,
)
from tests.measures import oracle
from tests.measures.cases import MASKS, B, D, H, Hk, Tk, Tq, additive, operands, pick


def assert_agree(got: RowStatistics, want: dict[str, Tensor], rtol: float = 1e-5, atol: float = 1e-5) -> None:
    for name, values in got._asdict().items():
        torch.testing.assert_close(
            values.double(), want[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_every_mask_against_the_oracle(mask: Callable[[], Tensor | None], is_causal: bool) -> None:
    q, k = operands()
    m = mask()
    want = oracle.all_rows(q, k, m, is_causal)
    assert_agree(row_statistics(q, k, mask=m, is_causal=is_causal), want)
    maps = attention_map(q, k, mask=m, is_causal=is_causal)
    torch.testing.assert_close(maps.double(), want["probabilities"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy_from_maps(maps).double(), want["entropy"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize(("rows", "keys"), [(6, 9), (9, 4), (1, 7), (5, 1)])
def test_grouped_heads_and_cross_attention(key_heads: int, rows: int, keys: int) -> None:
    q, k = operands(key_heads=key_heads, rows=rows, keys=keys)
    for causal in (False, True):
        assert_agree(row_statistics(q, k, is_causal=causal), oracle.all_rows(q, k, None, causal))


@pytest.mark.parametrize("options", [{"scale": 0.7}, {"softcap": 1.5}, {"scale": -0.3, "softcap": 4.0}])
def test_scale_and_softcap(options: dict[str, float]) -> None:
    q, k = operands()
    m = MASKS["biases_and_hidden"]()
    assert_agree(row_statistics(q, k, mask=m, **options), oracle.all_rows(q, k, m, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_input_dtypes_against_the_oracle_on_the_same_values(dtype: torch.dtype) -> None:
    q, k = (x.to(dtype) for x in operands())
    m = additive(pick(B, 1, Tq, Tk), torch.finfo(dtype).min, dtype)
    got = row_statistics(q, k, mask=m)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {x.dtype for x in got} == {expected}
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert_agree(got, oracle.all_rows(q, k, m), rtol=tolerance, atol=tolerance)


def test_agrees_with_torch_under_its_own_causal_alignment() -> None:
    q, k = operands(heads=2, key_heads=2)
    eye = torch.eye(Tk).expand(B, 2, Tk, Tk)
    truth = torch.nn.functional.scaled_dot_product_attention(q, k, eye, is_causal=True)
    torch.testing.assert_close(attention_map(q, k, is_causal=True), truth)


@pytest.mark.parametrize("gap", [0.0, 2.0, 5.0, 10.0, 15.0, 20.0, 30.0, 80.0])
@pytest.mark.parametrize("offset", [0.0, -300.0])
def test_sharp_rows_keep_their_digits(gap: float, offset: float) -> None:
    # Keys are the identity: the row's logits are q itself, known to the last bit.
    u = torch.linspace(0.0, -1.0, 32) * 2.0**-4 - gap + offset
    u[5] = offset
    u = (u * 2**12).round() / 2**12
    got = row_statistics(u.view(1, 1, 1, 32), torch.eye(32)[None, None], scale=1.0).entropy.item()
    want = oracle.one_row(u.tolist(), [True] * 32, [0.0] * 32).entropy
    assert got == pytest.approx(want, rel=2e-6, abs=1e-37)


def test_an_entropy_of_a_millionth_nat_is_right() -> None:
    u = torch.tensor([0.0, -16.688], dtype=torch.float32)
    got = row_statistics(u.view(1, 1, 1, 2), torch.eye(2)[None, None], scale=1.0).entropy.item()
    assert got == pytest.approx(1e-6, rel=0.01)
    assert got == pytest.approx(oracle.one_row(u.tolist(), [True] * 2, [0.0] * 2).entropy, rel=1e-6)


def test_ties_at_the_top() -> None:
    u = torch.tensor([3.0, 3.0, 3.0, -60.0])
    got = row_statistics(u.view(1, 1, 1, 4), torch.eye(4)[None, None], scale=1.0).entropy.item()
    assert got == pytest.approx(math.log(3), rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_make_nan_where_they_are_seen(bad: float) -> None:
    q, k = torch.rand(1, 1, 3, 2) + 0.1, torch.rand(1, 1, 4, 2)
    k[0, 0, 3, 0] = bad
    seen = torch.ones(3, 4, dtype=torch.bool)
    seen[1, 3] = False
    got = row_statistics(q, k, mask=seen)
    assert got.entropy[0, 0].isnan().tolist() == [True, False, True]
    assert got.max_logit[0, 0, 1].isfinite()


def test_fully_masked_rows() -> None:
    q, k = operands()
    got = row_statistics(q, k, mask=torch.zeros(Tq, Tk, dtype=torch.bool))
    for values, want in zip(got, (0.0, 0.0, -math.inf, 0.0, 0.0), strict=True):
        assert (values == want).all()
    assert (attention_map(q, k, mask=torch.zeros(Tq, Tk, dtype=torch.bool)) == 0).all()


def test_no_rows_and_no_keys() -> None:
    q, k = operands()
    none = torch.empty(0, dtype=torch.int64)
    assert row_statistics(q, k, rows=none).entropy.shape == (B, H, 0)
    blind = row_statistics(q, k[:, :, :0])
    assert blind.num_keys.shape == (B, H, Tq)
    assert (blind.num_keys == 0).all()
    assert attention_map(q, k[:, :, :0]).shape == (B, H, Tq, 0)
    assert (row_statistics_from_logits(torch.zeros(1, 2, 3, 0)).max_logit == -math.inf).all()


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_chosen_rows_are_those_rows_of_all(mask: Callable[[], Tensor | None]) -> None:
    q, k = operands()
    rows = torch.tensor([5, 0, 2])
    m = mask()
    some = row_statistics(q, k, mask=m, is_causal=True, rows=rows)
    for a, b in zip(some, row_statistics(q, k, mask=m, is_causal=True), strict=True):
        torch.testing.assert_close(a, b[:, :, rows])
    assert torch.equal(attention_entropy(q, k, mask=m, is_causal=True, rows=rows), some.entropy)


def test_logits_with_masks_added() -> None:
    q, k = operands()
    for name in ("none", "minus_inf", "minus_1e9", "lowest", "minus_1e4"):
        m = MASKS[name]()
        want = oracle.all_rows(q, k, m)
        logits = q @ k.repeat_interleave(H // Hk, 1).mT / math.sqrt(D)
        got = row_statistics_from_logits(logits if m is None else logits + m)
        assert got.bias_norm.isnan().all()
        blind = want["num_keys"] == 0
        if name == "minus_1e4":  # a row of -1e4 alone cannot be told from a row of such logits
            keep = ~blind
            assert blind.any()
        else:
            keep = torch.ones_like(blind)
        for field in ("entropy", "num_keys", "max_logit", "logit_norm"):
            a, b = getattr(got, field).double()[keep], want[field][keep]
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_logits_given_are_left_as_they_were() -> None:
    logits = torch.randn(1, 2, 3, 4)
    before = logits.clone()
    rows = torch.tensor([2, 0])
    some = row_statistics_from_logits(logits, rows=rows)
    assert torch.equal(logits, before)
    assert torch.equal(some.entropy, row_statistics_from_logits(logits).entropy[:, :, rows])


def test_entropy_of_maps_with_any_leading_shape() -> None:
    maps = torch.tensor([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]], dtype=torch.bfloat16)
    assert entropy_from_maps(maps)[0].tolist() == pytest.approx([math.log(2), 0.0])
    assert entropy_from_maps(maps).dtype == torch.float32
    assert entropy_from_maps(maps[0]).shape == (2,)


def test_autocast_rounds_nothing() -> None:
    q, k = operands()
    plain = row_statistics(q, k)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = row_statistics(q, k)
        assert (q @ k[:, :1].mT).dtype == torch.bfloat16  # autocast was on
    for a, b in zip(inside, plain, strict=True):
        assert torch.equal(a, b)


def test_no_gradient_is_recorded() -> None:
    q, k = (x.requires_grad_() for x in operands())
    m = torch.zeros(H, Tq, Tk, requires_grad=True)
    assert not any(x.requires_grad for x in row_statistics(q, k, mask=m))
    assert not attention_map(q, k, mask=m).requires_grad


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_default_dtype_and_device_do_not_matter(default: torch.dtype) -> None:
    q, k = operands()
    m, rows = MASKS["minus_1e4"](), torch.tensor([1, 3])
    want = row_statistics(q, k, mask=m, is_causal=True, rows=rows)
    torch.set_default_dtype(default)
    try:
        with torch.device("meta"):
            got = row_statistics(q, k, mask=m, is_causal=True, rows=rows)
            plain = row_statistics(q, k, is_causal=True)
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
    assert torch.equal(plain.entropy, row_statistics(q, k, is_causal=True).entropy)


def test_nothing_asks_the_device_for_a_value() -> None:
    # Meta tensors hold no values: whatever would wait for a device raises on them.
    q, k = (x.to("meta") for x in operands())
    for m in (None, pick(Tq, Tk).to("meta"), torch.zeros(B, 1, Tq, Tk, device="meta")):
        rows = torch.arange(3, device="meta")
        got = row_statistics(q, k, mask=m, is_causal=True, rows=rows, max_bytes=4000)
        assert got.entropy.shape == (B, H, 3)
        assert attention_map(q, k, mask=m, is_causal=True).shape == (B, H, Tq, Tk)
    assert row_statistics_from_logits(torch.zeros(1, 2, 3, 4, device="meta")).entropy.shape == (1, 2, 3)


def test_compiles_without_a_graph_break() -> None:
    def statistics(q: Tensor, k: Tensor, m: Tensor, rows: Tensor) -> RowStatistics:
        return row_statistics(q, k, mask=m, is_causal=True, rows=rows)

    q, k = operands()
    arguments = (q, k, MASKS["biases_and_hidden"](), torch.tensor([1, 3]))
    compiled = torch.compile(statistics, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*arguments), statistics(*arguments), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"q": torch.zeros(2, 3, 4)}, r"must be \[batch, heads, tokens, head size\], got \(2, 3, 4\)"),
        ({"q": torch.zeros(2, 4, 6, 5)}, r"agree in batch and head size, got \(2, 4, 6, 5\)"),
        ({"k": torch.zeros(2, 3, 9, 8)}, "4 query heads cannot share 3 key heads"),
        ({"q": torch.zeros(2, 4, 6, 8, dtype=torch.int64)}, "must be floating, got torch.int64"),
        ({"softcap": 0.0}, "softcap must be positive and finite, got 0.0; pass None"),
        ({"scale": math.nan}, "scale must be finite, got nan"),
        ({"rows": torch.tensor([0.5])}, r"rows must be a one-dimensional int64 tensor .* torch.float32"),
        ({"rows": torch.tensor(3)}, r"of shape \(\)"),
        ({"mask": torch.zeros(5, 9)}, r"mask of shape \(5, 9\) does not broadcast"),
        ({"mask": torch.zeros(6, 9, dtype=torch.int32)}, "got torch.int32; convert it"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], text: str) -> None:
    q, k = operands()
    arguments = {"q": q, "k": k} | change
    for function in (row_statistics, attention_map, attention_entropy):
        with pytest.raises(ConfigurationError, match=text):
            function(**arguments)


def test_logits_of_another_shape_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"got torch.float32 of shape \(3, 4\)"):
        row_statistics_from_logits(torch.zeros(3, 4))
