"""The example, as a model: what its documentation claims."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import entropy_monitor as em
from entropy_monitor.measures import equilibrium_norm
from entropy_monitor.remedies.scale_invariance.clipping import relative_global_clip_
from entropy_monitor.remedies.scale_invariance.homogeneity import probe_homogeneity

LR = 0.1
EXAMPLE = Path(__file__).parents[2] / "examples" / "sibert.py"


@pytest.fixture(scope="module")
def sibert() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sibert_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def made(sibert: ModuleType, init_scale: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = sibert.Sibert(width=32, depth=2, heads=2)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(init_scale)
    return model


def norm_of(model: nn.Module) -> float:
    return float(torch.stack([p.detach().norm() for p in model.parameters()]).norm())


def test_it_is_0_homogeneous_in_all_its_parameters(sibert: ModuleType) -> None:
    model = made(sibert).double()
    (batch,) = sibert.batches(4, 1)
    for fn in (lambda m: m(batch[0]), lambda m: sibert.loss_of(m, batch)):
        found = probe_homogeneity(model, fn, scales=(0.3, 7.0))
        assert found.homogeneous
        assert abs(found.degree) < 1e-11
        assert found.residual < 1e-11
        assert found.breaks == ()
        assert found.zeros == ()
        assert found.frozen == ()
    # Alone, a weight between norms is scale-invariant too; embeddings share one norm.
    degrees = {g.name: g for g in found.groups}
    assert set(degrees) == {
        "tokens",
        "places",
        "head",
        *(f"blocks.{i}.{n}" for i in (0, 1) for n in ("attention.q", "attention.k", "attention.v")),
        *(f"blocks.{i}.{n}" for i in (0, 1) for n in ("attention.out", "up", "down")),
    }
    for name, group in degrees.items():
        assert group.homogeneous == (name not in ("tokens", "places")), name


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_eps_is_not_felt_far_out(sibert: ModuleType, dtype: torch.dtype, most: float, scale: float) -> None:
    (batch,) = sibert.batches(4, 1)
    base, far = made(sibert).to(dtype), made(sibert).to(dtype)
    with torch.no_grad():
        for p in far.parameters():
            p.mul_(scale)
    a, b = base(batch[0]), far(batch[0])
    assert (a - b).norm() < most * a.norm()
    sibert.loss_of(far, batch).backward()
    assert all(p.grad.isfinite().all() for p in far.parameters())


def test_one_softmax_or_one_bias_and_it_is_not(sibert: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    (batch,) = sibert.batches(4, 1)
    model = made(sibert, 10.0).double()
    model.blocks[1].up = nn.Linear(32, 128).double()  # of degree 0 its input, so that this one does no harm
    assert probe_homogeneity(model, lambda m: m(batch[0]), groups={}).homogeneous
    model.blocks[1].down = nn.Linear(128, 32).double()
    found = probe_homogeneity(model, lambda m: m(batch[0]), groups={})
    assert [b.module for b in found.breaks] == ["blocks.1.down"]
    monkeypatch.setattr(em, "scale_invariant_attention", lambda scores: scores.softmax(-1))
    found = probe_homogeneity(made(sibert, 10.0).double(), lambda m: m(batch[0]), groups={})
    assert [b.module for b in found.breaks] == ["blocks.0.attention", "blocks.1.attention"]


def test_its_entropy_is_measured(sibert: ModuleType) -> None:
    (batch,) = sibert.batches(4, 1)
    table = em.measure(made(sibert), batch[0], rows="all")
    assert set(table["attention"]) == {"relu"}
    assert table["entropy"].between(0, table["max_entropy"]).all()
    small = em.measure(made(sibert, 0.01), batch[0], rows="all")
    torch.testing.assert_close(
        *(torch.tensor(t["entropy"].to_numpy(copy=True)) for t in (small, table)), rtol=1e-4, atol=0.0
    )


def trained(
    sibert: ModuleType, init_scale: float, weight_decay: float, steps: int = 200
) -> tuple[float, float]:
    """Norm and mean loss of the last steps; without weight decay it is plain SGD."""
    model = made(sibert, init_scale)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, weight_decay=weight_decay)
    losses = []
    for batch in sibert.batches(8, steps):
        loss = sibert.loss_of(model, batch)
        loss.backward()
        if weight_decay:
            relative_global_clip_(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return norm_of(model), sum(losses[-30:]) / 30


@pytest.mark.parametrize("init_scale", [10.0, 100.0])
def test_weight_decay_recovers_from_a_larger_initialisation(sibert: ModuleType, init_scale: float) -> None:
    decay = 0.25
    start = norm_of(made(sibert, init_scale))
    norm, loss = trained(sibert, init_scale, decay)
    assert norm < max(3 * (1 - LR * decay) ** 200 * start, 0.5 * norm_of(made(sibert)))
    _, usual_loss = trained(sibert, 1.0, decay)
    assert abs(loss - usual_loss) < 0.3
    if init_scale == 100:
        stuck, stuck_loss = trained(sibert, init_scale, 0.0)
        assert stuck > 0.999 * start
        assert stuck_loss > loss + 0.5


def test_the_norm_settles_where_the_theory_says(sibert: ModuleType) -> None:
    decay, model = 0.2, made(sibert, 0.25)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, weight_decay=decay)
    norms, squares = [], []
    for step, batch in enumerate(sibert.batches(8, 200)):
        sibert.loss_of(model, batch).backward()
        found = relative_global_clip_(optimizer)
        if step >= 100:
            norms.append(norm_of(model))
            squares.append(float(torch.minimum(found.norm, found.max_norm)) ** 2 * norms[-1] ** 2)
        optimizer.step()
        optimizer.zero_grad()
    want = equilibrium_norm(LR, decay, (sum(squares) / len(squares)) ** 0.5)
    assert sum(norms) / len(norms) == pytest.approx(want, rel=0.03)
