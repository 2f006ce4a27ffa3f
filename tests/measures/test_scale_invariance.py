from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from entropy_monitor import measures
from entropy_monitor.errors import ConfigurationError
from entropy_monitor.measures import effective_learning_rate, equilibrium_gradient_norm, equilibrium_norm

ETA, DECAY = 0.3, 0.05


def scale_invariant(x: Tensor, target: Tensor) -> Tensor:
    """`1 - cos(x, target)`: noisy enough when the target is drawn anew at each step."""
    return 1 - torch.dot(x, target) / x.norm() / target.norm()


def test_a_simulation_settles_there() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, generator=generator, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.SGD([x], lr=ETA, weight_decay=DECAY)
    norms, squares = [], []
    for step in range(1200):
        target = torch.randn(400, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        scale_invariant(x, target).backward()
        if step >= 600:
            norms.append(float(x.detach().norm()))
            squares.append(float(x.grad.norm() * x.detach().norm()) ** 2)
        optimizer.step()
    sigma = math.sqrt(sum(squares) / len(squares))
    want = equilibrium_norm(ETA, DECAY, sigma)
    norm = sum(norms) / len(norms)
    assert norm == pytest.approx(want, rel=5e-3)
    stray = want * 2**0.25  # what the slides' first formula would give
    assert abs(norm - stray) > 0.1 * stray
    gradient = math.sqrt(sum(s / n**2 for s, n in zip(squares, norms, strict=True)) / len(norms))
    assert gradient == pytest.approx(equilibrium_gradient_norm(ETA, DECAY, norm), rel=5e-3)


def test_the_recursion_stands_still_there_and_only_there() -> None:
    sigma = 1.7

    def after(norm: float) -> float:
        return math.sqrt((1 - ETA * DECAY) ** 2 * norm**2 + (ETA * sigma / norm) ** 2)

    norm = equilibrium_norm(ETA, DECAY, sigma)
    assert after(norm) == pytest.approx(norm, rel=1e-14)
    assert after(0.9 * norm) > 0.9 * norm
    assert after(1.1 * norm) < 1.1 * norm
    assert equilibrium_gradient_norm(ETA, DECAY, norm) == pytest.approx(sigma / norm, rel=1e-14)


def test_a_step_moves_the_direction_as_on_the_sphere_with_the_effective_rate() -> None:
    target = torch.randn(7, dtype=torch.float64)
    for size in (0.1, 1.0, 30.0):
        x = (torch.ones(7, dtype=torch.float64) * size).requires_grad_()
        scale_invariant(x, target).backward()
        moved = x.detach() - ETA * x.grad
        unit = (x.detach() / x.detach().norm()).requires_grad_()
        scale_invariant(unit, target).backward()
        rate = effective_learning_rate(ETA, float(x.detach().norm()))
        want = unit.detach() - rate * unit.grad
        torch.testing.assert_close(moved / moved.norm(), want / want.norm(), rtol=1e-12, atol=1e-14)


def test_tensors_agree_with_floats() -> None:
    norms = torch.tensor([0.5, 2.0, 7.0], dtype=torch.float64)
    for function, arguments in (
        (effective_learning_rate, (ETA,)),
        (equilibrium_norm, (ETA, DECAY)),
        (equilibrium_gradient_norm, (ETA, DECAY)),
    ):
        got = function(*arguments, norms)
        assert got.dtype == torch.float64
        want = [function(*arguments, float(n)) for n in norms]
        torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-14, atol=0.0)
    assert equilibrium_norm(torch.tensor(ETA), DECAY, 1.0).dtype == torch.float32
    grid = equilibrium_norm(torch.tensor([[0.1], [0.2]]), torch.tensor([0.1, 0.2, 0.3]), 1.0)
    assert grid.shape == (2, 3)


def test_edges() -> None:
    assert equilibrium_norm(0.0, DECAY, 1.0) == 0
    assert effective_learning_rate(0.0, 2.0) == 0
    lr = torch.tensor([-1.0, 1.0, 30.0, math.nan])
    assert equilibrium_norm(lr, 0.1, 1.0).isnan().tolist() == [True, False, True, True]
    assert equilibrium_gradient_norm(lr, 0.1, 1.0).isnan().tolist() == [True, False, True, True]
    norm = torch.tensor([-1.0, 0.0, 1.0])
    assert effective_learning_rate(1.0, norm)[1:].tolist() == [math.inf, 1.0]
    assert effective_learning_rate(1.0, norm)[0].isnan()
    with torch.autocast("cpu", torch.bfloat16):
        assert equilibrium_norm(torch.tensor(ETA), DECAY, 1.0).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: equilibrium_norm(1.0, 0.0, 1.0), "weight_decay must be finite and above 0, got 0"),
        (lambda: equilibrium_norm(-1.0, 0.1, 1.0), "lr must be finite and 0 or more, got -1"),
        (lambda: equilibrium_norm(10.0, 0.2, 1.0), r"below 2, got 10.0 · 0.2 = 2"),
        (lambda: equilibrium_norm(1.0, 0.1, -1.0), "gradient_norm must be finite and 0 or more"),
        (lambda: equilibrium_gradient_norm(0.0, 0.1, 1.0), "lr must be finite and above 0"),
        (lambda: equilibrium_gradient_norm(0.1, 0.1, math.nan), "norm must be finite and 0 or more, got nan"),
        (lambda: effective_learning_rate(0.1, 0.0), "norm must be finite and above 0, got 0"),
        (lambda: effective_learning_rate("a", 1), "lr must be a real number or a tensor of them, got 'a'"),
        (lambda: effective_learning_rate(torch.ones(2), "a"), "norm must be a real number .*, got 'a'"),
        (lambda: effective_learning_rate(None, 1.0), "lr must be a real number .*, got None"),
        (lambda: equilibrium_norm(1.0, "a", 1.0), "weight_decay must be a real number .*, got 'a'"),
        (lambda: equilibrium_gradient_norm(0.1, 0.1, 1j), "norm must be a real number .*, got 1j"),
        (
            lambda: equilibrium_norm(torch.ones(2, dtype=torch.complex64), 0.1, 1.0),
            "lr must be a real number or a tensor of them, got a tensor of torch.complex64",
        ),
        (lambda: effective_learning_rate(-0.1, 1.0), "lr must be finite and 0 or more, got -0.1"),
    ],
)
def test_errors(call: object, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        call()  # type: ignore[operator]


def test_it_is_exported() -> None:
    assert {"effective_learning_rate", "equilibrium_gradient_norm", "equilibrium_norm"} <= set(
        measures.__all__
    )
