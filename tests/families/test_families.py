"""Every family, in every way it attends: each call found, in order, and each figure right."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import entropy_monitor as em
from tests.families import FAMILIES, Call, DenseCall, dense_calls
from tests.families.family import DROPOUT

ATTENTION = 1e-3  # nats; relative for logits
SIGMA = 1e-4  # relative
MAPS = 1e-4

CASES = [(name, way) for name, family in FAMILIES.items() for way in family.implementations]
TRAINED = [case for case in CASES if case[1] != "flex_attention"]


@dataclass(frozen=True)
class Measured:
    """A model that was measured, and what it should have come to."""

    table: pd.DataFrame
    maps: dict[str, list[Tensor]]
    faults: dict[str, int]
    calls: list[Call]
    dense: list[DenseCall]


@functools.cache
def reference(name: str) -> list[DenseCall]:
    family = FAMILIES[name]
    with family.within():
        return dense_calls(family.model("eager"), family.inputs())


@functools.cache
def measured(name: str, way: str) -> Measured:
    family = FAMILIES[name]
    model = family.model(way)
    # transformers compiles FlexAttention; its kernel written out in torch functions is the same, and quicker.
    with torch.compiler.set_stance("force_eager" if way == "flex_attention" else "default"):
        table = em.measure(model, **family.inputs())
        with em.capture(model, maps=True) as seen, torch.no_grad():
            model(**family.inputs())
    return Measured(table, dict(seen.maps), seen.faults, family.calls(model), reference(name))


def column(rows: pd.DataFrame, name: str) -> Tensor:
    return torch.tensor(rows[name].to_numpy(), dtype=torch.float64)


def calls_of(m: Measured) -> list[tuple[Call, DenseCall, pd.DataFrame]]:
    """What was expected of each call, and the rows of it that were found."""
    found = m.table.groupby(["layer", "call"], sort=False)
    return [
        (call, dense, found.get_group((call.layer, 0))) for call, dense in zip(m.calls, m.dense, strict=True)
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_reference_tells_heads_and_layers_apart(name: str) -> None:
    """Or else a head could be taken for another without any test failing."""
    dense = reference(name)
    calls = FAMILIES[name].calls(FAMILIES[name].model("eager"))
    assert len(dense) == len(calls)
    for d, call in zip(dense, calls, strict=True):
        assert call.w_q.shape[0] == call.w_k.shape[0] == d.maps.shape[1]
        figures = d.figures()
        assert (figures["entropy"] < 0.99 * figures["max_entropy"]).all(), figures
        assert figures["entropy"].std() > 20 * ATTENTION, figures
    heads = [maps for d in dense for maps in d.maps.unbind(1)]
    sigmas = torch.cat([torch.linalg.matrix_norm(c.w_k @ c.w_q.mT, 2) for c in calls])
    for i, j in itertools.combinations(range(len(heads)), 2):
        if heads[i].shape == heads[j].shape:
            assert (heads[i] - heads[j]).abs().max() > 1000 * MAPS, (i, j)
        assert (sigmas[i] - sigmas[j]).abs() > SIGMA * sigmas[i], (i, j)


@pytest.mark.parametrize(("name", "way"), CASES)
def test_calls_are_found_in_order(name: str, way: str) -> None:
    m = measured(name, way)
    assert m.faults == {}
    found = [(layer, call) for layer, call in m.table[["layer", "call"]].drop_duplicates().to_numpy()]
    assert found == [(c.layer, 0) for c in m.calls]
    assert list(m.table["head"]) == [h for c in m.calls for h in range(len(c.w_q))]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_attention(name: str, way: str) -> None:
    for call, dense, rows in calls_of(measured(name, way)):
        expected = dense.figures()
        assert column(rows, "rows_read").tolist() == expected["rows_read"].tolist(), call.layer
        for figure in ("entropy", "max_entropy"):
            torch.testing.assert_close(column(rows, figure), expected[figure], rtol=0, atol=ATTENTION)
        torch.testing.assert_close(
            column(rows, "max_logit"), expected["max_logit"], rtol=ATTENTION, atol=ATTENTION
        )


@pytest.mark.parametrize(("name", "way"), CASES)
def test_spectral_norms(name: str, way: str) -> None:
    for call, _, rows in calls_of(measured(name, way)):
        expected = {
            "sigma_q": torch.linalg.matrix_norm(call.w_q, 2),
            "sigma_k": torch.linalg.matrix_norm(call.w_k, 2),
            "sigma_qk": torch.linalg.matrix_norm(call.w_k @ call.w_q.mT, 2),
        }
        for figure, want in expected.items():
            got = column(rows, figure)
            assert ((got - want).abs() <= SIGMA * want).all(), f"{call.layer} {figure}: {got}, want {want}"


@pytest.mark.parametrize(("name", "way"), CASES)
def test_maps(name: str, way: str) -> None:
    m = measured(name, way)
    assert list(m.maps) == [c.layer for c in m.calls]
    for call, dense in zip(m.calls, m.dense, strict=True):
        (found,) = m.maps[call.layer]
        assert found.shape == dense.maps.shape
        wrong = ((found - dense.maps).abs().amax(-1) > MAPS) & dense.valid
        assert not wrong.any(), f"{call.layer}: rows {wrong.nonzero().tolist()[:5]}"


@pytest.mark.full
def test_compiled_flex_attention() -> None:
    """As transformers runs it: the same figures, and what the model puts out is the same to the bit."""
    family = FAMILIES["llama"]
    model = family.model("flex_attention")
    torch.compiler.reset()
    with torch.no_grad():
        before = model(**family.inputs())[0]
        with em.capture(model) as seen:
            during = model(**family.inputs())[0]
        after = model(**family.inputs())[0]
    assert torch.equal(before, during)
    assert torch.equal(before, after)
    assert list(seen.heads["layer"].drop_duplicates()) == [c.layer for c in family.calls(model)]
    for figure in ("entropy", "max_entropy", "max_logit"):
        want = torch.cat([d.figures()[figure] for d in reference("llama")])
        torch.testing.assert_close(column(seen.heads, figure), want, rtol=0, atol=ATTENTION)


def train(
    model: nn.Module, inputs: dict[str, Tensor], watched: bool
) -> tuple[Tensor, list[Tensor | None], object]:
    """Loss and gradients of a training forward, and what was seen of it."""
    model.zero_grad()
    torch.manual_seed(3)
    seen = None
    if watched:
        with em.capture(model) as seen:
            output = model(**inputs)
    else:
        output = model(**inputs)
    output = output if isinstance(output, Tensor) else output[0]
    loss = (output * torch.linspace(-1, 1, output.shape[-1])).square().mean()
    loss.backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return loss.detach(), gradients, seen


@pytest.mark.parametrize(("name", "way"), TRAINED)
def test_a_training_forward(name: str, way: str) -> None:
    """Every call is found under dropout, and loss and gradients are the same to the bit."""
    family = FAMILIES[name]
    model = family.model(way, DROPOUT).train()
    plain_loss, plain, _ = train(model, family.inputs(), watched=False)
    other_loss, _, _ = train(model, family.inputs(), watched=False)
    loss, gradients, seen = train(model, family.inputs(), watched=True)
    assert torch.equal(plain_loss, other_loss)  # it can be repeated at all
    assert torch.equal(plain_loss, loss)
    assert plain_loss.isfinite()
    for a, b in zip(plain, gradients, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert any(a is not None and a.abs().max() > 0 for a in plain)
    assert seen.faults == {}
    calls = family.calls(model)
    table = seen.heads
    assert list(table["layer"].drop_duplicates()) == [c.layer for c in calls]
    assert list(table["head"]) == [h for c in calls for h in range(len(c.w_q))]
    assert (table["call"] == 0).all()
    for figure in ("entropy", "max_entropy", "max_logit"):
        assert table[figure].notna().all()
    assert (table["entropy"] <= table["max_entropy"] + ATTENTION).all()
    # Dropout changes what is seen, not which keys are.
    room = torch.cat([d.figures()["max_entropy"] for d in reference(name)])
    torch.testing.assert_close(column(table, "max_entropy"), room, rtol=0, atol=ATTENTION)
