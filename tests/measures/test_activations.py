from __future__ import annotations

import pytest
import torch
from torch import Tensor

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.measures import activation_norm, activations, norm_at_least
from tests.measures.cases import random, true_norm


def one_direction(m: int, n: int) -> Tensor:
    """What a LayerNorm's output looks like: a common direction, and noise."""
    return 3 * random(1, 1, n, seed=1) + random(2, m, n)


def decaying(m: int, n: int) -> Tensor:
    return random(2, m, n) * torch.logspace(0, -4, n)


MATRICES = {
    "noise": lambda m, n: random(2, m, n),
    "one direction": one_direction,
    "decaying": decaying,
    "rank one": lambda m, n: random(2, m, 1) @ random(2, 1, n, seed=2),
    "tiny": lambda m, n: 1e-15 * random(2, m, n),
    "bfloat16": lambda m, n: random(2, m, n).bfloat16(),
    "strided": lambda m, n: random(m, 2, n).transpose(0, 1),
}


@pytest.mark.parametrize("shape", [(7, 5), (300, 64), (64, 300), (400, 384), (1000, 700)])
@pytest.mark.parametrize("kind", MATRICES)
def test_bounds_on_both_sides(kind: str, shape: tuple[int, int]) -> None:
    x = MATRICES[kind](*shape)
    true = true_norm(x)
    least, most = norm_at_least(x).double(), activation_norm(x).double()
    assert (least <= true * (1 + 1e-4)).all()
    assert (most >= true).all()
    assert (most <= true * (1.06 if min(shape) <= 256 else 1.7)).all()
    assert (least >= (1 - 1e-4) * true / min(shape) ** 0.5).all()


def test_equal_singular_values_are_the_worst_case() -> None:
    x = torch.linalg.qr(random(5, 500, 64)).Q
    assert activation_norm(x[0]) < 1.0025
    assert 1.13 < activation_norm(x).max() < 64 ** (1 / 32) * 1.0001


def test_the_lower_bound_is_near_where_one_direction_dominates() -> None:
    x = one_direction(300, 64)
    assert (norm_at_least(x).double() >= 0.99 * true_norm(x)).all()


@pytest.mark.parametrize("shape", [(3, 4), (300, 400)])
def test_what_is_zero_or_not_finite(shape: tuple[int, int]) -> None:
    x = random(3, *shape)
    x[0], x[1, 2, 1] = 0.0, torch.nan
    for bound in (norm_at_least(x), activation_norm(x)):
        assert bound[0] == 0
        assert bound[1].isnan()
        assert bound[2].isfinite()
    for empty in (x[:, :0], x[:, :, :0]):
        assert (norm_at_least(empty) == 0).all()
        assert (activation_norm(empty) == 0).all()


def test_no_random_state_is_touched_and_the_result_is_the_same() -> None:
    x = random(400, 384)
    state = torch.get_rng_state()
    first = activation_norm(x)
    torch.manual_seed(5)
    assert torch.equal(activation_norm(x), first)
    torch.set_rng_state(state)
    activation_norm(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_asks_the_device_for_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "starting_vectors", lambda n, count, like: like.new_empty(n, count))
    for shape in ((2, 400, 384), (2, 400, 64), (2, 64, 400)):
        x = torch.empty(shape, device="meta")
        assert activation_norm(x).shape == norm_at_least(x).shape == (2,)


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.zeros(3, 4, dtype=torch.int64)])
def test_what_is_no_floating_matrix_is_refused(bad: Tensor) -> None:
    with pytest.raises(ConfigurationError, match="a floating matrix"):
        activation_norm(bad)
