"""Every family, compiled and trained one step: the same to the bit, and the figures of eager mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import entropy_monitor as em
from tests.compiled.figures import assert_same_figures, assert_same_rows, tensors
from tests.families import FAMILIES
from tests.families.family import DROPOUT

TOLERANCE = 1e-3
QUICK = (("llama", "sdpa"), ("gpt2", "eager"))
CASES = [
    pytest.param(backend, name, way, marks=[] if quick else [pytest.mark.full])
    for name, family in FAMILIES.items()
    for way in family.implementations
    if way != "flex_attention"  # compiled by transformers itself: see tests/families
    for backend in ("aot_eager", "inductor")
    if (quick := (name, way) in QUICK and backend == "aot_eager") is not None
]


def step(model: nn.Module, forward: Any, inputs: dict[str, Any]) -> list[Tensor]:
    """Outputs and gradients of a forward and a backward."""
    torch.manual_seed(3)
    model.zero_grad()
    out = list(tensors(forward(**inputs)))
    learnt = [t for t in out if t.requires_grad and t.is_floating_point()]
    sum((t.float().square().mean() for t in learnt), torch.zeros(())).backward()
    return [t.detach() for t in out] + [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(("backend", "name", "way"), CASES)
def test_a_compiled_training_step(backend: str, name: str, way: str) -> None:
    family = FAMILIES[name]
    dropout = DROPOUT if backend == "aot_eager" else 0.0  # inductor draws other numbers than eager mode
    with family.within():
        model, inputs = family.model(way, dropout).train(), family.inputs()
        with em.capture(model) as expected:
            step(model, model, inputs)
        compiled = torch.compile(model, backend=backend)
        plain = step(model, compiled, inputs)
        with em.capture(model) as seen:
            watched = step(model, compiled, inputs)
    for a, b in zip(plain, watched, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert seen.faults == {}
    assert_same_rows(seen.heads, expected.heads)
    assert_same_figures(seen.heads, expected.heads, TOLERANCE)
