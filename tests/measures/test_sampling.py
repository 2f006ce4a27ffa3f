from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.measures import systematic_rows, systematic_standard_error


@pytest.mark.parametrize(("num_rows", "count"), [(16, 5), (100, 32), (1000, 999), (7, 1), (10**6, 64)])
def test_sorted_distinct_and_in_equal_strides(num_rows: int, count: int) -> None:
    for step in (0, 1, 10, 999_999_999):
        rows = systematic_rows(num_rows, count, step)
        assert rows.dtype == torch.int64
        assert rows.shape == (count,)
        assert 0 <= rows[0] <= rows[-1] < num_rows
        strides = set(rows.diff().tolist())
        assert strides <= {num_rows // count, -(-num_rows // count)}


@pytest.mark.parametrize("count", ["all", 5, 6])
def test_all_rows(count: Any) -> None:
    assert systematic_rows(5, count, 3).tolist() == [0, 1, 2, 3, 4]


def test_no_rows() -> None:
    assert systematic_rows(0, 4, 1).tolist() == []


@pytest.mark.parametrize(("num_rows", "count"), [(64, 8), (100, 7), (37, 36)])
@pytest.mark.parametrize("every", [1, 10])
def test_over_the_steps_every_row_is_read_equally_often(num_rows: int, count: int, every: int) -> None:
    times = torch.zeros(num_rows)
    measured = 2000
    for step in range(0, measured * every, every):
        times[systematic_rows(num_rows, count, step)] += 1
    expected = measured * count / num_rows
    # A golden-ratio sequence strays by a few visits; independent draws would stray by √expected.
    assert (times - expected).abs().max() < min(8, math.sqrt(expected))


def test_depends_on_the_step_alone_and_leaves_random_states_be() -> None:
    torch.manual_seed(0)
    random.seed(0)
    states = torch.get_rng_state(), random.getstate()
    first = systematic_rows(100, 8, 30)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    torch.manual_seed(1)
    assert torch.equal(systematic_rows(100, 8, 30), first)
    assert not torch.equal(systematic_rows(100, 8, 31), first)


def test_made_on_the_device_asked_for() -> None:
    assert systematic_rows(100, 8, 3, device="meta").device.type == "meta"


@pytest.mark.parametrize("count", [0, -3, 2.0, "some", True, None])
def test_a_count_that_is_none_is_refused(count: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"positive integer or 'all', got {count!r}"):
        systematic_rows(10, count, 0)


@pytest.mark.parametrize("num_rows", [-1, 10**6 + 1])
def test_a_number_of_rows_out_of_range_is_refused(num_rows: int) -> None:
    with pytest.raises(ConfigurationError, match=f"within 0 and 10\\^6, got {num_rows}"):
        systematic_rows(num_rows, 3, 0)


def naive_standard_error(values: Tensor, weights: Tensor, num_rows: int) -> list[float]:
    B, H, R = values.shape
    out = []
    for h in range(H):
        y = []
        for r in range(R):
            w = [weights[b, h, r].item() for b in range(B)]
            if sum(w) > 0:
                y.append(sum(w[b] * values[b, h, r].item() for b in range(B) if w[b]) / sum(w))
        if num_rows == R:
            out.append(0.0)
        elif len(y) < 2:
            out.append(math.nan)
        else:
            n = len(y)
            differences = sum((b - a) ** 2 for a, b in pairwise(y))
            f = R / num_rows
            trend = (1 - f**2) / 12 * ((y[-1] - y[0]) / n) ** 2
            out.append(math.sqrt((1 - f) / n * differences / (2 * (n - 1)) + trend))
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
    got = systematic_standard_error(values, weights, 40)
    assert got.tolist() == pytest.approx(naive_standard_error(values, weights, 40), nan_ok=True)
    assert got.isnan().tolist() == [False, False, True, True, False]


def test_nothing_is_uncertain_when_all_rows_were_read() -> None:
    assert systematic_standard_error(torch.randn(2, 3, 4), torch.ones(2, 3, 4), 4).tolist() == [0.0] * 3


def test_one_row_of_many_says_nothing() -> None:
    assert systematic_standard_error(torch.randn(2, 3, 1), torch.ones(2, 3, 1), 4).isnan().all()


def test_an_entropy_that_is_nan_is_not_hidden() -> None:
    values = torch.zeros(1, 1, 4)
    values[0, 0, 2] = math.nan
    assert systematic_standard_error(values, torch.ones(1, 1, 4), 10).isnan().all()


@pytest.mark.parametrize(("trend", "noise"), [(0.0, 0.5), (0.6, 0.2), (0.6, 0.02), (-0.6, 0.5)])
@pytest.mark.parametrize("R", [16, 32, 128])
def test_is_of_the_size_of_the_errors_that_sampling_makes(trend: float, noise: float, R: int) -> None:
    g = torch.Generator().manual_seed(5)
    T, H = 256, 200
    shape = torch.arange(1.0, T + 1).log() * trend  # as a causal mask makes it
    values = shape + noise * torch.randn(2, H, T, generator=g)
    truth = values.mean((0, 2))
    squares, estimates, unordered = [], [], []
    for step in range(60):
        read = values[:, :, systematic_rows(T, R, step)]
        squares.append((read.mean((0, 2)) - truth).square().mean().item())
        estimates.append(systematic_standard_error(read, torch.ones_like(read), T).square().mean().item())
        unordered.append((read.mean(0).var(-1) * (1 - R / T) / R).mean().item())
    ratio = math.sqrt(sum(estimates) / sum(squares))
    assert 0.85 < ratio < 1.2
    if trend and noise < 0.5:  # the formula of independent rows would not do
        assert math.sqrt(sum(unordered) / sum(squares)) > 2


def test_standard_error_of_misshapen_values_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"at most num_rows=4 rows, got shape \(2, 3, 5\)"):
        systematic_standard_error(torch.zeros(2, 3, 5), torch.ones(2, 3, 5), 4)


def test_compiles_without_a_graph_break() -> None:
    def both(values: Tensor) -> tuple[Tensor, Tensor]:
        rows = systematic_rows(100, 8, 30, values.device)
        return rows, systematic_standard_error(values, torch.ones_like(values), 100)

    values = torch.randn(2, 3, 8)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(values), both(values), strict=True):
        torch.testing.assert_close(a, b)


def test_standard_error_waits_for_no_device() -> None:
    values = torch.zeros(2, 3, 5, device="meta")
    assert systematic_standard_error(values, values, 9).shape == (3,)
