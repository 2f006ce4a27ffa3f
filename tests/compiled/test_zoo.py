"""Every model of the zoo, compiled: the same output, and the figures of eager mode."""

from __future__ import annotations

import pytest
import torch

import entropy_monitor as em
from tests.compiled.figures import assert_same_figures, assert_same_rows, tensors
from tests.hooks.test_zoo import built
from tests.zoo import ZOO

TOLERANCE = 1e-4
# In eager mode the memory of a map with a matrix for each head does not tell which rows are which tokens;
# compiled code asks the values.
ONLY_COMPILED = {"weights-per_head": ("floor_weights",), "weights-per_head_matmul": ("floor_weights",)}
QUICK = ("nanogpt-masked_fill", "llama-kv2-gqa-half-qknorm", "logits-softcap", "mha-both-True", "swin")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.full]) for n in ZOO]
)
def test_figures_of_compiled_models(name: str) -> None:
    model, inputs = built(ZOO[name])
    expected = em.measure(model, *inputs)
    compiled = torch.compile(model, backend="aot_eager")
    torch.manual_seed(3)
    plain = list(tensors(compiled(*inputs)))
    torch.manual_seed(3)
    with em.capture(model) as seen:
        watched = list(tensors(compiled(*inputs)))
    assert plain
    for a, b in zip(plain, watched, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert seen.faults == {}
    assert_same_rows(seen.heads, expected)
    for column in ONLY_COMPILED.get(name, ()):
        assert expected.pop(column).isna().all()
        assert (seen.heads[column] <= seen.heads["entropy"]).all()
    assert_same_figures(seen.heads, expected, TOLERANCE)
