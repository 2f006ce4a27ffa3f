from __future__ import annotations

import math
import random
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.measures.sampling import (
    rows_for,
    standard_error_of_sums,
    stratified_rows,
    stratified_standard_error,
    stratum_sums,
)


def naive_rows(num_rows: int, count: int, step: int) -> list[int]:
    """With fractions of real numbers; those left out are chosen where that is the smaller part of two."""
    if count >= num_rows:
        return list(range(num_rows))
    golden = Fraction(round(2**20 * (math.sqrt(5) - 1) / 2), 2**20)
    if Fraction(count, num_rows) > golden:
        left_out = naive_rows(num_rows, num_rows - count, step)
        return [row for row in range(num_rows) if row not in left_out]
    shift = Fraction(int((Decimal(step) * (Decimal(2).sqrt() - 1) % 1) * 2**20), 2**20)
    return [int((k + (k * golden + shift) % 1) * num_rows / count) for k in range(count)]


SIZES = [(16, 5), (100, 32), (1000, 999), (1000, 617), (1000, 619), (7, 1), (52, 32), (51, 32), (10**6, 64)]


@pytest.mark.parametrize(("num_rows", "count"), SIZES)
def test_one_row_of_each_stratum_ascending_and_distinct(num_rows: int, count: int) -> None:
    for step in (0, 1, 10, 70, 999_999):
        rows = stratified_rows(num_rows, count, step)
        assert rows.dtype == torch.int64
        assert rows.tolist() == naive_rows(num_rows, count, step)
        assert len(rows) == count
        assert 0 <= rows[0] <= rows[-1] < num_rows
        assert (rows.diff() > 0).all()
        if count < num_rows / 2:
            strata = [int(row) * count / num_rows for row in rows]
            assert all(k - count / num_rows < place < k + 1 for k, place in enumerate(strata))


def test_any_numbers_give_distinct_rows() -> None:
    for num_rows in range(1, 80):
        for count in range(1, num_rows + 1):
            rows = stratified_rows(num_rows, count, 7 * num_rows + count)
            assert len(rows) == count
            assert (rows.diff() > 0).all()
            assert 0 <= rows[0] <= rows[-1] < num_rows


@pytest.mark.parametrize("count", ["all", 5, 6])
def test_all_rows(count: Any) -> None:
    assert stratified_rows(5, count, 3).tolist() == [0, 1, 2, 3, 4]


def test_no_rows() -> None:
    assert stratified_rows(0, 4, 1).tolist() == []


@pytest.mark.parametrize(("num_rows", "count"), [(64, 8), (100, 7), (37, 36), (50, 32)])
@pytest.mark.parametrize("every", [1, 10, 20, 80, 640])
def test_over_the_steps_every_row_is_read_equally_often(num_rows: int, count: int, every: int) -> None:
    times = torch.zeros(num_rows)
    measured = 2000
    for step in range(0, measured * every, every):
        times[stratified_rows(num_rows, count, step)] += 1
    expected = measured * count / num_rows
    # A golden-ratio sequence strays by a few visits; independent draws would stray by √expected.
    assert (times - expected).abs().max() < min(8, math.sqrt(expected))


def test_depends_on_the_step_alone_and_leaves_random_states_be() -> None:
    torch.manual_seed(0)
    random.seed(0)
    states = torch.get_rng_state(), random.getstate()
    first = stratified_rows(100, 8, 30)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    torch.manual_seed(1)
    assert torch.equal(stratified_rows(100, 8, 30), first)
    assert not torch.equal(stratified_rows(100, 8, 31), first)


def test_made_on_the_device_asked_for() -> None:
    assert stratified_rows(100, 8, 3, device="meta").device.type == "meta"


@pytest.mark.parametrize("count", [0, -3, 2.0, "some", True, None])
def test_a_count_that_is_none_is_refused(count: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"positive integer or 'all', got {count!r}"):
        stratified_rows(10, count, 0)


@pytest.mark.parametrize("num_rows", [-1, 10**6 + 1])
def test_a_number_of_rows_out_of_range_is_refused(num_rows: int) -> None:
    with pytest.raises(ConfigurationError, match=f"within 0 and 10\\^6, got {num_rows}"):
        stratified_rows(num_rows, 3, 0)


def naive_standard_error(
    values: Tensor, weights: Tensor, num_rows: int, allowance: float = math.log(2)
) -> list[float]:
    B, H, R = values.shape
    out = []
    for h in range(H):
        valid = [(b, r) for b in range(B) for r in range(R) if weights[b, h, r] > 0]
        n = len({r for _, r in valid})
        if num_rows == R:
            out.append(0.0)
        elif n < 2:
            out.append(math.nan)
        else:
            mean = sum(values[b, h, r].item() for b, r in valid) / len(valid)
            e = [0.0] * R
            for b, r in valid:
                e[r] += values[b, h, r].item() - mean
            variance = sum((b - a) ** 2 for a, b in pairwise(e)) / (2 * (R - 1))
            variance = (1 + 2 / n) ** 2 * R * variance + allowance**2
            out.append(math.sqrt((1 - R / num_rows) * variance) / len(valid))
    return out


def test_standard_error_against_the_formula() -> None:
    g = torch.Generator().manual_seed(0)
    values = torch.randn(3, 5, 8, generator=g, dtype=torch.float64)
    weights = (torch.rand(3, 5, 8, generator=g) > 0.4).double()
    weights[:, 0, :3] = 0  # the first positions
    weights[:, 1, 3:5] = 0  # some between
    weights[:, 2, 1:] = 0  # one left
    weights[:, 3] = 0  # none left
    values[weights == 0] = math.nan
    got = stratified_standard_error(values, weights, 40)
    assert got.tolist() == pytest.approx(naive_standard_error(values, weights, 40), nan_ok=True)
    assert got.isnan().tolist() == [False, False, True, True, False]
    without = naive_standard_error(values, weights, 40, 0.0)
    assert stratified_standard_error(values, weights, 40, 0.0).tolist() == pytest.approx(without, nan_ok=True)


def test_nothing_is_uncertain_when_all_rows_were_read() -> None:
    assert stratified_standard_error(torch.randn(2, 3, 4), torch.ones(2, 3, 4), 4).tolist() == [0.0] * 3


def test_one_row_of_many_says_nothing() -> None:
    assert stratified_standard_error(torch.randn(2, 3, 1), torch.ones(2, 3, 1), 4).isnan().all()


def test_an_entropy_that_is_nan_is_not_hidden() -> None:
    values = torch.zeros(1, 1, 4)
    values[0, 0, 2] = math.nan
    assert stratified_standard_error(values, torch.ones(1, 1, 4), 10).isnan().all()


def sampled(values: Tensor, weights: Tensor, R: int, steps: int) -> tuple[Tensor, Tensor]:
    """Errors of the sampled means, and their standard errors, `[steps, H]` each."""
    T = values.shape[-1]
    errors, estimates = [], []
    truth = (weights * values).sum((0, 2)) / weights.expand_as(values).sum((0, 2))
    for step in range(0, 10 * steps, 10):
        rows = stratified_rows(T, R, step)
        y, w = values[..., rows], weights[..., rows]
        errors.append((w * y).sum((0, 2)) / w.expand_as(y).sum((0, 2)) - truth)
        estimates.append(stratified_standard_error(y, w, T))
    return torch.stack(errors), torch.stack(estimates)


@pytest.mark.parametrize(("trend", "noise"), [(0.0, 0.5), (0.6, 0.5), (-0.6, 0.5), (0.6, 0.2)])
@pytest.mark.parametrize("R", [16, 32, 128])
def test_intervals_hold(trend: float, noise: float, R: int) -> None:
    g = torch.Generator().manual_seed(5)
    T, H = 256, 200
    shape = torch.arange(1.0, T + 1).log() * trend  # as a causal mask makes it
    values = shape + noise * torch.randn(2, H, T, generator=g)
    errors, estimates = sampled(values, torch.ones(2, 1, T), R, 60)
    assert 0.6 < (errors.abs() < estimates).float().mean() < 0.87
    assert 0.94 < (errors.abs() < 1.96 * estimates).float().mean() < 0.995
    assert 1 < estimates.square().mean().sqrt() / errors.square().mean().sqrt() < 1.6


@pytest.mark.parametrize("R", [16, 32, 64])
def test_a_trend_alone_averages_out_as_equal_strides_would_not(R: int) -> None:
    T = 1024
    values = torch.arange(1.0, T + 1).log()[None, None]
    errors, estimates = sampled(values, torch.ones(1, 1, T), R, 200)
    strides = [
        values[..., (torch.arange(R) * T + offset) // R].mean() - values.mean() for offset in range(0, T, 9)
    ]
    assert errors.square().mean() < torch.stack(strides).square().mean() / 3
    assert (errors.abs() < 1.96 * estimates).float().mean() > 0.95


@pytest.mark.parametrize("period", [2, 4, 8, 16])
def test_what_repeats_does_not_fall_into_step_with_the_rows(period: int) -> None:
    values = (torch.arange(512) % period == 0).float()[None, None]
    errors, estimates = sampled(values, torch.ones(1, 1, 512), 32, 200)
    strides = [values[..., torch.arange(offset, 512, 16)].mean() - values.mean() for offset in range(16)]
    assert errors.square().mean() < torch.stack(strides).square().mean() / 4
    assert (errors.abs() < 1.96 * estimates).float().mean() > 0.95


@pytest.mark.parametrize("batch", [1, 4])
def test_intervals_of_heads_that_collapsed_but_for_rare_rows(batch: int) -> None:
    g = torch.Generator().manual_seed(5)
    T, H = 512, 200
    rare = torch.rand(batch, H, T, generator=g) < 0.01
    values = 1e-3 + rare * math.log(2) * 2 * torch.rand(batch, H, T, generator=g)
    errors, estimates = sampled(values, torch.ones(batch, 1, T), rows_for(32, T, batch), 60)
    assert (errors.abs() < 1.96 * estimates).float().mean() > 0.94
    assert estimates.max() < 0.06


def test_equal_rows_leave_room_for_one_that_differs() -> None:
    read, T = 64, 512
    se = stratified_standard_error(torch.zeros(1, 1, read), torch.ones(1, 1, read), T)
    assert se.item() == pytest.approx(math.log(2) / read * math.sqrt(1 - read / T))
    assert stratified_standard_error(torch.zeros(1, 1, read), torch.ones(1, 1, read), T, 0.0) == 0


def test_sums_of_batches_add_up_to_those_of_one() -> None:
    g = torch.Generator().manual_seed(3)
    values = torch.randn(5, 3, 8, generator=g, dtype=torch.float64)
    weights = (torch.rand(5, 3, 8, generator=g) > 0.3).double()
    sums = sum((stratum_sums(v[None], w[None]) for v, w in zip(values, weights, strict=True)), torch.zeros(1))
    whole = stratified_standard_error(values, weights, 40)
    torch.testing.assert_close(standard_error_of_sums(sums, 8 / 40), whole)


@pytest.mark.parametrize("left", [False, True])
def test_intervals_hold_with_padding(left: bool) -> None:
    g = torch.Generator().manual_seed(5)
    T, H, B = 256, 100, 4
    lengths = torch.randint(T // 4, T, (B, 1, 1), generator=g)
    places = torch.arange(T)
    weights = ((places >= T - lengths) if left else (places < lengths)).float()
    seen = (places - (T - lengths) * left).clamp(min=0) + 1.0
    values = seen.log() + 0.5 * torch.randn(B, H, T, generator=g)
    errors, estimates = sampled(values, weights, 32, 100)
    assert (errors.abs() < 1.96 * estimates).float().mean() > 0.94
    assert 1 < estimates.square().mean().sqrt() / errors.square().mean().sqrt() < 1.5


def test_twice_the_rows_where_there_is_one_sequence() -> None:
    assert [rows_for(32, 1000, batch) for batch in (1, 2, 8)] == [64, 32, 32]
    assert rows_for(32, 50, 1) == 50
    assert rows_for(32, 20, 8) == 20


def test_standard_error_of_misshapen_values_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"at most num_rows=4 rows, got shape \(2, 3, 5\)"):
        stratified_standard_error(torch.zeros(2, 3, 5), torch.ones(2, 3, 5), 4)


def test_compiles_without_a_graph_break() -> None:
    def both(values: Tensor) -> tuple[Tensor, Tensor]:
        rows = stratified_rows(100, 8, 30, values.device)
        return rows, stratified_standard_error(values, torch.ones_like(values), 100)

    values = torch.randn(2, 3, 8)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(values), both(values), strict=True):
        torch.testing.assert_close(a, b)


def test_standard_error_waits_for_no_device() -> None:
    values = torch.zeros(2, 3, 5, device="meta")
    assert stratified_standard_error(values, values, 9).shape == (3,)
