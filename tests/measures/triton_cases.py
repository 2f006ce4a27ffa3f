"""Run by `test_triton_rows.py` in a process of its own, where triton interprets.

`python -m tests.measures.triton_cases GROUP…` prints one line for each case that passed, and raises at the
first that did not.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import numpy as np
import torch
from torch import Tensor

from entropy_monitor.measures import RowStatistics, floor_row, row_statistics
from entropy_monitor.measures.triton_rows import (
    supports_triton,
    triton_available,
    triton_head_sums,
    triton_logsumexp,
    triton_row_statistics,
)
from tests.measures import oracle
from tests.measures.cases import MASKS, additive, operands, pick


def long_operands(
    tokens: int = 100, size: int = 24, spread: float = 2.0, heads: int = 2, key_heads: int = 1
) -> tuple[Tensor, Tensor]:
    """More rows and keys than a tile has, and no multiple of one."""
    g = torch.Generator().manual_seed(5)
    q = torch.randn(1, heads, tokens, size, generator=g) * spread
    return q, torch.randn(1, key_heads, tokens, size, generator=g) + 0.5


def truth(q: Tensor, k: Tensor, window: tuple[int | None, int | None] | None = None, **options: Any) -> Any:
    """Float64; `test_rows.py` holds it against the oracle, which would take minutes at these lengths."""
    if window is not None:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        left, right = (k.shape[2] + q.shape[2] if side is None else side for side in window)
        options["mask"] = (j >= i - left) & (j <= i + right)
    return row_statistics(q.double(), k.double(), **options)


def agree(q: Tensor, k: Tensor, rtol: float = 2e-5, atol: float = 2e-5, **options: Any) -> RowStatistics:
    """Rows against float64, and sums against the rows."""
    got, want = triton_row_statistics(q, k, **options), truth(q, k, **options)
    for name, a, b in zip(got._fields, got, want, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    sums = triton_head_sums(q, k, **options)
    seen = (got.num_keys > 0).float()
    floor = floor_row(got.logit_norm, got.num_keys)
    for total, rows in (
        (sums.rows, seen),
        (sums.entropy, got.entropy * seen),
        (sums.max_entropy, got.num_keys.clamp(min=1).log() * seen),
        (sums.floor_row, floor * seen),
    ):
        torch.testing.assert_close(total.double(), rows.double().sum((0, 2)), rtol=1e-5, atol=1e-5)
    assert torch.equal(sums.max_logit, got.max_logit.amax((0, 2)))
    return got


def masks() -> None:
    q, k = operands()
    for name, make in MASKS.items():
        for is_causal in (False, True):
            m = make()
            got = triton_row_statistics(q, k, mask=m, is_causal=is_causal)
            want = oracle.all_rows(q, k, m, is_causal)
            for field, values in got._asdict().items():
                torch.testing.assert_close(values.double(), want[field], rtol=1e-5, atol=1e-5)
            print(name, is_causal)


def hidden_values() -> None:
    """Values near those that hide, in every dtype that a mask may have."""
    near = [0.0, -100.0, -9900.0, -9950.0, -9984.0, -1e4, -10048.0, -10100.0, -3e4, -6e4, -9.9e8, -1e9, -1e30]
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for two_valued in (False, True):
            values = [0.0, -1e4] * 6 if two_valued else near
            m = torch.tensor([[*values, math.nan, -math.inf]], dtype=dtype)
            q, k = torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, m.shape[1], 8)
            if two_valued:
                m = torch.cat([m[:, :-2], m[:, :2]], 1)
            got, want = triton_row_statistics(q, k, mask=m), truth(q, k, mask=m)
            assert torch.equal(got.num_keys, want.num_keys.float())
            print(dtype, two_valued)


def tiles() -> None:
    q, k = long_operands()
    keep = pick(1, 2, 100, 100)
    keep[0, 1, 7] = False
    soft = torch.randn(100, 100, generator=torch.Generator().manual_seed(2))
    for mask in (None, keep, keep[:, :1, :1], keep[..., :1], soft, additive(keep, -1e4), soft.bfloat16()):
        for is_causal in (False, True):
            agree(q, k, mask=mask, is_causal=is_causal)
            print("mask", None if mask is None else (tuple(mask.shape), mask.dtype), is_causal)
    for rows, keys in ((70, 100), (100, 70), (1, 100), (100, 1), (64, 96), (65, 33)):
        for options in ({"is_causal": True}, {"window": (9, 3)}, {}):
            agree(q[:, :, :rows], k[:, :, :keys], **options)
            print(rows, keys, options)


def windows() -> None:
    q, k = long_operands()
    for left, right in ((0, 0), (20, 5), (20, None), (None, 5), (100, 0), (None, None), (0, 99), (500, 500)):
        agree(q, k, window=(left, right))
        print(left, right)
    causal = triton_row_statistics(q, k, window=(20, 5), is_causal=True)
    assert torch.equal(causal.entropy, triton_row_statistics(q, k, window=(20, 0)).entropy)


def dtypes() -> None:
    sizes = {
        torch.bfloat16: (1, 24, 64, 80, 128, 256),
        torch.float16: (24, 256),
        torch.float32: (1, 128, 200),
    }
    for dtype, chosen in sizes.items():
        for size in chosen:
            q, k = (x.to(dtype) for x in long_operands(tokens=70, size=size))
            agree(q, k, is_causal=True)
            print(dtype, size)
    agree(*(x.bfloat16() for x in long_operands(tokens=140, size=16)), window=(70, 0))
    q, k = long_operands()
    agree(q.half(), k)
    for key_heads in (1, 2, 4):
        agree(*long_operands(heads=4, key_heads=key_heads), is_causal=True)
    agree(q.mT.contiguous().mT, k[:, :, ::2], is_causal=True)
    folded = torch.cat([q, q], 1).transpose(1, 2).contiguous().transpose(1, 2)  # tokens before heads
    agree(folded[:, ::2], k)


def factors() -> None:
    q, k = long_operands()
    soft = torch.randn(2, 100, 100, generator=torch.Generator().manual_seed(2))
    for options in (
        {"scale": 0.7},
        {"softcap": 1.5},
        {"scale": -0.3, "softcap": 4.0, "mask": soft},
        {"scale": 0.0},
    ):
        agree(q, k, **options)
        print(sorted(options))
    agree(q * 100, k, softcap=30.0, atol=2e-4)


def extremes() -> None:
    eye = torch.eye(64)[None, None]
    for gap in (2.0, 10.0, 16.0, 30.0, 80.0):
        for offset in (0.0, -300.0, 10000.0):
            u = torch.linspace(0.0, -1.0, 64) * 2.0**-4 - gap + offset
            u[40] = offset
            u = ((u * 2**9).round() / 2**9).view(1, 1, 1, 64)
            got = triton_row_statistics(u, eye, scale=1.0).entropy.item()
            want = oracle.one_row(u.flatten().tolist(), [True] * 64, [0.0] * 64).entropy
            assert abs(got - want) <= 4e-6 * want + 1e-36, (gap, offset, got, want)
            print(gap, offset, got)
    u = torch.tensor([0.0, -16.688] + [-200.0] * 62).view(1, 1, 1, 64)
    assert abs(triton_row_statistics(u, eye, scale=1.0).entropy.item() - 1e-6) < 1e-8
    ties = torch.full((1, 1, 1, 64), -60.0)
    ties[..., [3, 30, 50]] = 3.0
    assert abs(triton_row_statistics(ties, eye, scale=1.0).entropy.item() - math.log(3)) < 1e-6
    q, k = long_operands(spread=4000.0)
    got, want = triton_row_statistics(q, k, is_causal=True), truth(q, k, is_causal=True)
    assert want.max_logit.max() > 1e4
    assert (got.entropy - want.entropy).abs().max() < 1e-3
    q, k = long_operands()
    lse = triton_logsumexp(q, k, is_causal=True).double()
    logits = q.double() @ k.double().mT / math.sqrt(24)
    logits = logits.masked_fill(torch.ones(100, 100).triu(1).bool(), -math.inf)
    torch.testing.assert_close(lse, logits.logsumexp(-1), rtol=1e-6, atol=1e-5)


def faults() -> None:
    none = torch.zeros(100, 100, dtype=torch.bool)
    q, k = long_operands()
    got = triton_row_statistics(q, k, mask=none)
    for values, want in zip(got, (0.0, 0.0, -math.inf, 0.0, 0.0), strict=True):
        assert (values == want).all()
    sums = triton_head_sums(q, k, mask=none)
    assert sums.rows.tolist() == sums.entropy.tolist() == sums.floor_row.tolist() == [0.0, 0.0]
    assert triton_logsumexp(q, k, mask=none).max() == -math.inf
    for bad in (math.nan, math.inf, -math.inf):
        q, k = torch.rand(1, 1, 3, 2) + 0.1, torch.rand(1, 1, 140, 2)
        k[0, 0, 100, 0] = bad
        seen = torch.ones(3, 140, dtype=torch.bool)
        seen[1, 100] = False
        got = triton_row_statistics(q, k, mask=seen)
        assert got.entropy[0, 0].isnan().tolist() == [True, False, True], bad
        assert got.max_logit[0, 0, 1].isfinite()
        if bad != -math.inf:
            torch.testing.assert_close(
                got.max_logit, row_statistics(q, k, mask=seen).max_logit, equal_nan=True
            )
        sums = triton_head_sums(q, k, mask=seen)
        assert sums.entropy.isnan().all()
        assert torch.equal(sums.max_logit, got.max_logit.amax((0, 2))) or sums.max_logit.isnan().all()
        print(bad)


def state() -> None:
    q, k = (x.requires_grad_() for x in long_operands())
    before = torch.get_rng_state()
    plain = triton_row_statistics(q, k)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = triton_row_statistics(q, k)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(x.requires_grad for x in plain)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))
    assert triton_available(q.device)
    assert supports_triton(q, k, torch.zeros(100, 100), True, 3.0)
    assert not supports_triton(q, k, modify=lambda logits, *_: (logits, None))


GROUPS: dict[str, Callable[[], None]] = {
    f.__name__: f for f in (masks, hidden_values, tiles, windows, dtypes, factors, extremes, faults, state)
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    np.seterr(all="ignore")  # inf - inf and log 0 in lanes that a select then drops
    for group in sys.argv[1:]:
        GROUPS[group]()
