"""Forwards that are traced, transformed or interrupted while watched: left alone, and not misread."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn, overrides
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import entropy_monitor as em
from tests.training import HEADS_N, TOKENS, WIDTH, FusedAttention, SeparateAttention, Tiny, tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Converting a tensor to a Python float"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]
ROWS = 3 * TOKENS
Forward = Callable[[nn.Module, Tensor], Any]


def batch() -> Tensor:
    return torch.randn(3, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


def model(attention: type[nn.Module] = FusedAttention) -> nn.Module:
    """In eval mode without dropout; written out by hand, for fused kernels know neither vmap nor jvp."""
    built: nn.Module = tiny(attention)
    return built.eval()


@pytest.fixture(autouse=True)
def _no_mode_is_left() -> Iterator[None]:
    yield
    left = overrides._get_current_function_mode_stack()
    while overrides._len_torch_function_stack():
        overrides._pop_mode()
    assert left == []


# Traced


def traced(net: nn.Module, x: Tensor) -> Any:
    return torch.jit.trace(net, x, check_trace=False)


def graph_of(script: Any) -> str:
    """The graph, without the numbers that tell classes of the same name apart, and the lines it is from."""
    return re.sub(r"___torch_mangle_\d+\.| *#.*", "", str(script.inlined_graph))


@pytest.mark.parametrize("attention", [SeparateAttention, FusedAttention])
def test_a_trace_shows_the_model_alone(attention: type[nn.Module]) -> None:
    """The graph is that of an unwatched trace, and what runs while it is recorded is not measured."""
    net, x = model(attention), batch()
    plain = traced(net, x)
    with em.capture(net) as seen:
        watched = traced(net, x)
    assert graph_of(watched) == graph_of(plain)
    assert torch.equal(watched(x), net(x))
    assert len(seen.heads) == 0
    assert seen.faults == {}


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
def test_a_checked_trace_counts_the_forward_that_it_is_checked_against() -> None:
    """`torch.jit.trace` runs the model once more as it is, and that forward is one like any other."""
    net, x = model(SeparateAttention), batch()
    with em.capture(net) as seen:
        torch.jit.trace(net, x)
        seen_by_trace = seen.heads.rows_read.tolist()
        net(x)
    assert seen_by_trace == [ROWS] * (2 * HEADS_N)
    assert seen.heads.rows_read.tolist() == [2 * ROWS] * (2 * HEADS_N)
    assert seen.faults == {}


def test_a_trace_between_the_steps_of_a_run(tmp_path: Path) -> None:
    net, x = tiny(FusedAttention), batch()
    with em.EntropyMonitor(net, run_dir=tmp_path, every=1) as monitor:
        net(x).sum().backward()
        traced(net, x)
        assert monitor.step().measured
    assert monitor.faults == {}
    assert set(em.load_run(tmp_path).heads["rows_read"]) == {ROWS}


# Transformed


def parameters(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in net.named_parameters()}


def loss(net: nn.Module, x: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda given: torch.func.functional_call(net, given, (x,)).square().sum()


def per_sample(net: nn.Module, x: Tensor) -> Any:
    """The gradient of each sequence."""
    one = torch.func.grad(lambda p, y: loss(net, y[None])(p))
    return torch.vmap(one, in_dims=(None, 0))(parameters(net), x)


TRANSFORMS: dict[str, Forward] = {
    "vmap": lambda net, x: torch.vmap(net)(torch.stack([x, -x])),
    "grad": lambda net, x: torch.func.grad(loss(net, x))(parameters(net)),
    "grad of each sequence": per_sample,
    "vjp": lambda net, x: torch.func.vjp(net, x)[0],
    "jvp": lambda net, x: torch.func.jvp(net, (x,), (torch.ones_like(x),)),
    "jacrev": lambda net, x: torch.func.jacrev(lambda y: net(y).sum(-1))(x[:1]),
    "functionalize": lambda net, x: torch.func.functionalize(net)(x),
}


def same(one: Any, two: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tree_leaves(one), tree_leaves(two), strict=True))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transformed_forward_is_left_out(name: str) -> None:
    """Its tensors stand for others: sums of them would outlive the transform, or be of the wrong rows."""
    net, x, transform = model(), batch(), TRANSFORMS[name]
    plain = transform(net, x)
    alone = em.measure(net, x)
    with em.capture(net) as seen:
        watched = transform(net, x)
        assert len(seen.heads) == 0
        assert "left out: 1 inside torch.func (vmap, grad, …)" in str(seen.nothing_found())
        net(x)
    assert same(plain, watched)
    assert seen.heads.equals(alone)
    assert seen.faults == {}


def test_a_run_of_transformed_forwards_alone_says_so(tmp_path: Path) -> None:
    net, x = tiny(FusedAttention), batch()
    monitor = em.EntropyMonitor(net, run_dir=tmp_path, every=1)
    torch.func.grad(loss(net, x))(parameters(net))
    with pytest.raises(em.AttentionNotFoundError, match=r"1 inside torch\.func \(vmap, grad, …\)"):
        monitor.step()


def test_other_weights_without_a_transform_are_read() -> None:
    """`functional_call` alone runs the model with other weights: these are what is measured."""
    net, x = model(), batch()
    given = {name: 2 * p for name, p in parameters(net).items()}
    with em.capture(net) as seen:
        torch.func.functional_call(net, given, (x,))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(given[name])
    assert seen.heads.equals(em.measure(net, x))


class Within(Tiny):
    """Two blocks, the second of which the forward itself transforms."""

    def __init__(self, transform: Forward) -> None:
        super().__init__(FusedAttention)
        self.transform = transform

    def forward(self, x: Tensor) -> Tensor:
        y = self.transform(self.blocks[1], self.blocks[0](x))
        assert isinstance(y, Tensor)
        return y


def test_attention_under_a_vmap_of_the_models_own_takes_no_other_with_it() -> None:
    torch.manual_seed(0)
    net, x = Within(lambda block, y: torch.vmap(block)(y[:, None])).eval(), batch()
    plain = net(x)
    with em.capture(net) as seen:
        assert torch.equal(net(x), plain)
    assert seen.faults == {}
    assert seen.heads.layer.tolist() == ["blocks.0"] * HEADS_N
    assert seen.heads.entropy.equals(em.measure(net.blocks[0], x).entropy)
    assert "blocks.1" in str(seen.describe())
    assert "inside torch.func.vmap" in str(seen.describe())


def test_attention_under_a_gradient_of_the_models_own_is_read() -> None:
    torch.manual_seed(0)
    net = Within(lambda block, y: torch.func.grad(lambda z: block(z).square().sum())(y)).eval()
    x = batch()
    plain = net(x)
    with em.capture(net) as seen:
        assert torch.equal(net(x), plain)
    within = em.measure(net.blocks[1], net.blocks[0](x).detach())
    found = seen.heads[seen.heads.layer == "blocks.1"]
    assert seen.faults == {}
    assert found.rows_read.tolist() == [ROWS] * HEADS_N
    torch.testing.assert_close(
        torch.tensor(found.entropy.to_numpy()), torch.tensor(within.entropy.to_numpy()), rtol=0, atol=1e-6
    )


# Interrupted


class Noting(TorchFunctionMode):
    """A mode of the user's, which counts functions."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class Stopped(nn.Module):
    """Runs until the user presses Ctrl-C."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.stop = model(), True

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        if self.stop:
            raise KeyboardInterrupt
        assert isinstance(y, Tensor)
        return y


def interrupted(net: nn.Module, x: Tensor) -> None:
    with pytest.raises(KeyboardInterrupt):
        net(x)


@pytest.mark.parametrize("modes", [1, 2])
def test_the_next_forward_below_modes_of_the_users(modes: int) -> None:
    """The interrupt left our mode below theirs, which `__exit__` would have taken for its own."""
    net, x = Stopped(), batch()
    theirs = [Noting() for _ in range(modes)]
    with em.capture(net) as seen:
        interrupted(net, x)
        net.stop = False
        for mode in theirs:
            mode.__enter__()
        net(x)
        assert overrides._get_current_function_mode_stack() == theirs
        before = [mode.count for mode in theirs]
        torch.ones(2).exp()
        assert [mode.count for mode in theirs] > before
        for mode in reversed(theirs):
            mode.__exit__(None, None, None)
    assert seen.heads.rows_read.tolist() == [2 * ROWS] * (2 * HEADS_N)
    assert seen.faults == {}


def test_the_end_of_watching_below_a_mode_of_the_users() -> None:
    net, x = Stopped(), batch()
    watched = em.capture(net)
    watched.__enter__()
    interrupted(net, x)
    with Noting() as theirs:
        watched.__exit__(None, None, None)
        assert overrides._get_current_function_mode_stack() == [theirs]
        assert overrides._get_current_function_mode() is theirs


@pytest.mark.parametrize("around", [Noting, lambda: torch.device("meta")], ids=["mode", "device"])
def test_a_mode_of_the_users_around_the_interrupted_forward_ends(around: Callable[[], Any]) -> None:
    net, x = Stopped(), batch()
    with em.capture(net), pytest.raises(KeyboardInterrupt), around():
        net(x)
    left = overrides._get_current_function_mode_stack()
    while overrides._len_torch_function_stack():
        overrides._pop_mode()
    assert left == []
    assert torch.ones(1).device.type == "cpu"
