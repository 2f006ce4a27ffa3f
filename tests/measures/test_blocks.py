from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from entropy_monitor.measures import attention_map, row_statistics, row_statistics_from_logits
from entropy_monitor.measures._blocks import blocks
from tests.measures.cases import MASKS, B, H, Tk, Tq, operands


@pytest.mark.parametrize("group", [1, 2, 6])
@pytest.mark.parametrize("max_bytes", [1, 30, 70, 400, 10**6])
def test_every_row_is_in_one_block_and_blocks_fit(group: int, max_bytes: int) -> None:
    met = []
    for b, h, r in blocks(3, 6, 5, group=group, row_bytes=10, head_bytes=7, max_bytes=max_bytes):
        met += product(range(b.start, b.stop), range(h.start, h.stop), range(r.start, r.stop))
        heads, rows = h.stop - h.start, r.stop - r.start
        key_heads = (h.stop - 1) // group - h.start // group + 1
        assert heads % group == 0 or key_heads == 1
        size = (b.stop - b.start) * (key_heads * 7 + heads * rows * 10)
        assert size <= max_bytes or (heads, rows) == (1, 1)
    assert sorted(met) == list(product(range(3), range(6), range(5)))


@pytest.mark.parametrize("max_bytes", [1, 500, 2_000, 5_000, 20_000])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_blocks_change_nothing(max_bytes: int, key_heads: int) -> None:
    q, k = operands(key_heads=key_heads)
    for name in ("none", "bool_3d", "minus_1e4", "biases_and_hidden"):
        m = MASKS[name]()
        for rows in (None, torch.tensor([1, 3, 4])):
            options: dict[str, Any] = {"mask": m, "is_causal": True, "rows": rows}
            whole = row_statistics(q, k, **options)
            for a, b in zip(row_statistics(q, k, **options, max_bytes=max_bytes), whole, strict=True):
                torch.testing.assert_close(a, b)
            maps = attention_map(q, k, **options, max_bytes=max_bytes)
            torch.testing.assert_close(maps, attention_map(q, k, **options))
    logits = torch.randn(B, H, Tq, Tk)
    for a, b in zip(
        row_statistics_from_logits(logits, max_bytes=max_bytes),
        row_statistics_from_logits(logits),
        strict=True,
    ):
        torch.testing.assert_close(a, b, equal_nan=True)


class Largest(TorchDispatchMode):
    """Remembers the size in bytes of the largest tensor that owns memory of its own."""

    def __init__(self, given: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in given}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


def largest_tensor(function: Callable[[], object], *given: Tensor) -> int:
    """Bytes; measured on a thread of its own, which has kept no memory of earlier blocks."""

    def measured() -> int:
        with Largest(given) as seen:
            function()
        return seen.bytes

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(measured).result()


@pytest.mark.parametrize("key_heads", [1, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_no_temporary_exceeds_the_limit(key_heads: int, masked: bool) -> None:
    q = torch.randn(2, 4, 128, 16, dtype=torch.bfloat16).transpose(1, 2).contiguous().transpose(1, 2)
    k = torch.randn(2, 128, key_heads, 16, dtype=torch.bfloat16).transpose(1, 2)
    m = torch.zeros(2, 1, 128, 128).masked_fill_(torch.rand(2, 1, 128, 128) > 0.9, -1e4) if masked else None
    limit = 100_000
    given = (q, k) if m is None else (q, k, m)
    read = partial(row_statistics, q, k, mask=m, is_causal=True)
    assert largest_tensor(partial(read, max_bytes=limit), *given) <= limit
    assert largest_tensor(read, *given) > limit  # the check sees what it should
