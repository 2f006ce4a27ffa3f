from __future__ import annotations

import math

import pytest
import torch

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.measures import hidden, hidden_logits
from entropy_monitor.measures.masks import as_four_dimensions, cut, is_two_valued

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def test_boolean_true_is_seen() -> None:
    assert hidden(torch.tensor([True, False])).tolist() == [False, True]


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_hiding_value(dtype: torch.dtype) -> None:
    lowest = torch.finfo(dtype).min
    values = [-math.inf, -1e9, lowest, lowest / 2, 0.0, -100.0, 3.0, -9000.0]
    assert hidden(torch.tensor(values, dtype=dtype)).tolist() == [True] * 4 + [False] * 4


def test_sum_of_two_lowest_values_hides() -> None:
    lowest = torch.tensor([torch.finfo(torch.float32).min])
    assert hidden(lowest + lowest).item()


@pytest.mark.parametrize("dtype", FLOATS)
def test_ten_thousand_hides_only_in_a_mask_of_two_values(dtype: torch.dtype) -> None:
    two = torch.tensor([[0.0, -1e4], [0.0, 0.0]], dtype=dtype)
    assert hidden(two).tolist() == [[False, True], [False, False]]
    three = two.clone()
    three[1, 1] = -2.5
    assert not hidden(three).any()


@pytest.mark.parametrize("value", [-1e9, -1e4])
def test_a_mask_cast_up_from_bfloat16_keeps_hiding(value: float) -> None:
    mask = torch.tensor([0.0, value], dtype=torch.bfloat16).float()
    assert mask[1] != value  # the rounding this is about
    assert hidden(mask).tolist() == [False, True]


def test_nan_counts_as_seen() -> None:
    assert not hidden(torch.tensor([math.nan, 0.0])).any()


def test_two_valued_is_decided_by_the_whole_mask() -> None:
    mask = torch.tensor([[0.0, -1e4], [0.5, 0.0]])
    assert not is_two_valued(mask)
    assert hidden(mask[:1]).any()
    assert not hidden(mask[:1], is_two_valued(mask)).any()


@pytest.mark.parametrize("max_bytes", [1, 10, 100, 10**6])
def test_two_valued_in_pieces(max_bytes: int) -> None:
    mask = torch.where(torch.rand(3, 1, 5, 7) > 0.5, 0.0, -1e4)
    assert is_two_valued(mask, max_bytes)
    mask[2, 0, 4, 6] = -1.0
    assert not is_two_valued(mask, max_bytes)
    assert not is_two_valued(mask.expand(3, 1000, 5, 7), max_bytes)


def test_integer_mask_is_refused_with_a_way_out() -> None:
    with pytest.raises(ConfigurationError, match=r"got torch.int64; convert it with mask.bool\(\)"):
        hidden(torch.tensor([0, 1]))


@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 5), (1, 4, 5), (2, 3, 4, 5), (2, 1, 1, 5), (5,)])
def test_four_dimensions_broadcast_alike(shape: tuple[int, ...]) -> None:
    mask = torch.randn(shape)
    view = as_four_dimensions(mask, (2, 3, 4, 5))
    assert view.dim() == 4
    assert view.data_ptr() == mask.data_ptr()
    assert torch.equal(view.expand(2, 3, 4, 5), mask.expand(2, 3, 4, 5))


@pytest.mark.parametrize("shape", [(4, 6), (2, 4, 5), (1, 2, 3, 4, 5)])
def test_a_mask_that_does_not_fit_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigurationError, match=r"does not broadcast to the logits' shape \(2, 3, 4, 5\)"):
        as_four_dimensions(torch.zeros(shape), (2, 3, 4, 5))


@pytest.mark.parametrize("shape", [(2, 3, 6, 5), (1, 3, 6, 1), (2, 1, 1, 5)])
def test_cut_agrees_with_indexing_the_expanded_mask(shape: tuple[int, ...]) -> None:
    mask = torch.randn(shape)
    rows = torch.tensor([5, 0, 3])
    b, h = slice(1, 2), slice(1, 3)
    full = mask.expand(2, 3, 6, 5)[b, h]
    assert torch.equal(cut(mask, b, h, rows).expand(1, 2, 3, 5), full[:, :, rows])
    assert torch.equal(cut(mask, b, h, slice(2, 4)).expand(1, 2, 2, 5), full[:, :, 2:4])


@pytest.mark.parametrize("dtype", FLOATS)
def test_logits_that_carry_a_mask(dtype: torch.dtype) -> None:
    u = torch.tensor([[2.0, -1e4 + 30, -60.0], [-1e4, -1e4 - 20, -1e4], [1.0, -1e9, -math.inf]], dtype=dtype)
    assert hidden_logits(u).tolist() == [[False, True, False], [False] * 3, [False, True, True]]
