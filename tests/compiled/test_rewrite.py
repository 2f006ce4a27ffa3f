"""A graph that cannot be rewritten to the end runs as if nobody had tried."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import entropy_monitor as em
from entropy_monitor.hooks.compiled import rewrite
from tests.compiled.models import TOKENS, WIDTH, Attention, ByHand, Net


def inputs() -> Tensor:
    return torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


class Apart(Attention):
    """Its projections run outside of the checkpointed region, which must be given their weights."""

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(F.scaled_dot_product_attention, *self.heads(x), use_reentrant=False)
        assert isinstance(y, Tensor)
        return self.join(y)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: Net(ByHand),
    "checkpointed": lambda: Net(ByHand, checkpointing="plain"),
    "checkpointed after the projections": lambda: Net(Apart),
}


class Graphs:
    """A backend that keeps the text of what it is given, and runs it as it is."""

    def __init__(self) -> None:
        self.given: list[str] = []

    def __call__(self, module: fx.GraphModule, example: Any) -> Callable[..., Any]:
        self.given.append(module.print_readable(print_output=False))
        return module.forward


def gradients(model: nn.Module, out: Tensor) -> list[Tensor]:
    model.zero_grad()
    out.square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("place", "nth"), [("register", 1), ("register", 2), ("recompile", 1)])
def test_a_rewrite_that_fails_half_way_leaves_the_graph_as_it_was(
    place: str, nth: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within checkpointed regions too, to which arguments are added."""
    torch.manual_seed(0)
    model, x, graphs = MODELS[name](), inputs(), Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    expected = compiled(x)
    plain = gradients(model, expected)
    work, calls = getattr(rewrite, place), itertools.count(1)

    def faulty(*args: Any) -> Any:
        if next(calls) == nth:
            raise RuntimeError("broken by hand")
        return work(*args)

    monkeypatch.setattr(rewrite, place, faulty)
    with em.capture(model) as seen:
        found = compiled(x)
        again = gradients(model, found)
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert seen.faults == {"following compiled code": 1}
    assert len(seen.heads) == 0
    first, second = graphs.given
    assert second == first
    assert "entropy_monitor" not in second


@pytest.mark.parametrize("name", MODELS)
def test_the_same_rewrite_without_a_fault_changes_the_graph(name: str) -> None:
    """So that the test above can fail."""
    model, graphs = MODELS[name](), Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    compiled(inputs())
    with em.capture(model):
        compiled(inputs())
    first, second = graphs.given
    assert ("_for_reading" in second) == (name == "checkpointed after the projections")
    assert second.count("entropy_monitor.read") == 2
    assert second != first
