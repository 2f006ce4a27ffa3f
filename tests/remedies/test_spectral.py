"""The parametrization of one weight: values, gradients, and when u and v move."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import entropy_monitor as em
from entropy_monitor.remedies.reparametrization.folding import scales_of
from entropy_monitor.remedies.reparametrization.scaling import scaled_weight
from entropy_monitor.remedies.reparametrization.spectral import SpectralScale, singular_vectors
from tests.remedies.models import images, loss_of, train_step, vit

GROUPS = {
    "one": None,
    "rows": torch.tensor([0, 0, 1, 1, 0, 2])[:, None],
    "columns": torch.tensor([0, 1, 1, 0, 0])[None, :],
}


def weight(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def snapshot(model: nn.Module) -> list[Tensor]:
    return [x.clone() for _, s in scales_of(model) for x in (s.u, s.v)]


def moved(model: nn.Module, before: list[Tensor]) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(snapshot(model), before, strict=True))


class Algorithm1(nn.Module):
    """The paper's pseudo code (appendix B): one iteration before the weight is used, in every forward."""

    def __init__(self, u: Tensor, v: Tensor) -> None:
        super().__init__()
        self.register_buffer("u", u)
        self.register_buffer("v", v)
        self.gamma = nn.Parameter(torch.ones(1, dtype=u.dtype))

    def forward(self, w: Tensor) -> Tensor:
        with torch.no_grad():
            u = w @ self.v
            u = u / u.norm()
            v = w.t() @ u
            v = v / v.norm()
            self.u, self.v = u, v
        return self.gamma / torch.einsum("d,dc,c->", self.u, w, self.v) * w


def linears(model: nn.Module) -> list[nn.Linear]:
    return [m for m in model.modules() if isinstance(m, nn.Linear)]


def test_training_is_the_papers_algorithm_step_by_step() -> None:
    ours, papers = vit(), vit()
    em.sigma_reparam(ours, gamma="one")
    for mine, theirs in zip(linears(ours), linears(papers), strict=True):
        scale = mine.parametrizations.weight[0]
        # Vectors that have not converged; the paper's iterate once before they are used.
        start = torch.nn.functional.normalize(weight(len(scale.v), seed=3), dim=0)
        theirs_scale = Algorithm1(scale.u.clone(), start)
        u = torch.nn.functional.normalize(theirs.weight.detach() @ start, dim=0)
        scale.u.copy_(u)
        scale.v.copy_(torch.nn.functional.normalize(theirs.weight.detach().t() @ u, dim=0))
        parametrize.register_parametrization(theirs, "weight", theirs_scale, unsafe=True)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.1) for m in (ours, papers)]
    for _ in range(12):
        a, b = (train_step(m, o) for m, o in zip((ours, papers), optimizers, strict=True))
        assert a == pytest.approx(b, rel=1e-10)
    for mine, theirs in zip(linears(ours), linears(papers), strict=True):
        torch.testing.assert_close(mine.weight, theirs.weight, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", GROUPS)
def test_the_weight_is_scaled_to_gamma(name: str) -> None:
    w, group = weight(6, 5), GROUPS[name]
    u, sigma, v = singular_vectors(w, group)
    gamma = torch.arange(1.0, len(sigma) + 1, dtype=torch.float64)
    scaled = scaled_weight(w, gamma, u, v, group)
    index = torch.zeros(6, dtype=torch.long) if group is None else group.flatten()
    lines, scaled_lines = (w.t(), scaled.t()) if name == "columns" else (w, scaled)
    for g in range(len(sigma)):
        exact = torch.linalg.matrix_norm(lines[index == g], 2)
        torch.testing.assert_close(sigma[g], exact)
        torch.testing.assert_close(scaled_lines[index == g], gamma[g] / exact * lines[index == g])


@pytest.mark.parametrize("name", GROUPS)
def test_gradients(name: str) -> None:
    w, group = weight(6, 5), GROUPS[name]
    u, sigma, v = singular_vectors(w, group)
    u, v = (
        u + 0.1 * weight(*u.shape, seed=2),
        v + 0.1 * weight(*v.shape, seed=3),
    )  # neither converged nor unit
    args = (w.requires_grad_(), (sigma + 1).requires_grad_(), u, v, group)
    assert torch.autograd.gradcheck(scaled_weight, args)
    assert torch.autograd.gradgradcheck(scaled_weight, args)


def test_function_transforms() -> None:
    w = weight(4, 6, 5)
    u, sigma, v = singular_vectors(w[0], None)
    gamma, tangent = sigma + 1, weight(6, 5, seed=4)
    _, ours = torch.func.jvp(lambda x, g: scaled_weight(x, g, u, v, None), (w[0], gamma), (tangent, gamma))
    step = 1e-6
    plus = scaled_weight(w[0] + step * tangent, gamma * (1 + step), u, v, None)
    minus = scaled_weight(w[0] - step * tangent, gamma * (1 - step), u, v, None)
    torch.testing.assert_close(ours, (plus - minus) / (2 * step), rtol=1e-7, atol=1e-8)
    many = torch.vmap(lambda x: scaled_weight(x, gamma, u, v, None))(w)
    torch.testing.assert_close(many, torch.stack([scaled_weight(x, gamma, u, v, None) for x in w]))


def test_gradients_of_a_kernel() -> None:
    w = weight(4, 2, 3, 3).requires_grad_()
    u, sigma, v = singular_vectors(w, None)
    assert torch.autograd.gradcheck(lambda w, g: scaled_weight(w, g, u, v, None), (w, sigma.requires_grad_()))


def test_the_gradient_is_that_of_the_true_spectral_norm() -> None:
    w = weight(7, 5).requires_grad_()
    u, _, v = singular_vectors(w, None)
    gamma = torch.tensor([1.5], dtype=torch.float64)
    target = weight(7, 5, seed=9)
    (ours,) = torch.autograd.grad((scaled_weight(w, gamma, u, v, None) * target).sum(), w)
    (exact,) = torch.autograd.grad((1.5 / torch.linalg.matrix_norm(w, 2) * w * target).sum(), w)
    torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_scaled_in_float32(dtype: torch.dtype) -> None:
    w = weight(40, 30, dtype=dtype)
    u, sigma, v = singular_vectors(w, None)
    assert u.dtype == sigma.dtype == torch.float32
    scaled = scaled_weight(w, torch.tensor([2.0]), u, v, None)
    exact = 2 / torch.linalg.matrix_norm(w.double(), 2) * w.double()
    assert scaled.dtype == dtype
    assert torch.equal(scaled, exact.to(dtype))


def test_autocast_rounds_nothing() -> None:
    layer = em.sigma_reparam(nn.Linear(30, 20), gamma="preserve")
    plain = layer.weight
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.weight, plain)


def test_a_zero_weight_behaves_as_a_plain_one_until_it_moves() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4, bias=False)
    nn.init.zeros_(layer.weight)
    em.sigma_reparam(layer, gamma="preserve")
    x = torch.randn(3, 6)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(x).sum().backward()
    (scale,) = (s for _, s in scales_of(layer))
    assert torch.equal(scale.weight.grad, x.sum(0).expand(4, 6))  # as of a plain layer
    assert torch.isfinite(scale.gamma.grad).all()
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).sum().backward()
        optimizer.step()
    sigma = torch.linalg.matrix_norm(scale.weight, 2)
    torch.testing.assert_close(scale.u @ scale.weight @ scale.v, sigma)
    assert torch.isfinite(layer(x)).all()
    assert scale.gamma.abs() > 0


def test_a_gamma_that_is_no_number_is_not_hidden() -> None:
    w = weight(4, 3)
    u, _, v = singular_vectors(w, None)
    gamma = torch.tensor([torch.nan], dtype=torch.float64)
    assert scaled_weight(w, gamma, u, v, None).isnan().all()


def test_a_rank_one_weight_is_followed_to_another() -> None:
    layer = nn.Linear(5, 5, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.outer(weight(5), weight(5, seed=1)))
    em.sigma_reparam(layer, gamma="preserve")
    (scale,) = (s for _, s in scales_of(layer))
    optimizer = torch.optim.SGD([scale.weight], lr=1.0)
    scale.weight.grad = scale.weight.detach() - torch.outer(weight(5, seed=2), weight(5, seed=3))
    optimizer.step()
    torch.testing.assert_close(scale.u @ scale.weight @ scale.v, torch.linalg.matrix_norm(scale.weight, 2))


def test_a_weight_without_numbers_leaves_the_vectors_alone() -> None:
    layer = em.sigma_reparam(nn.Linear(5, 5), gamma="preserve")
    before = snapshot(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer(torch.full((1, 5), torch.nan)).sum().backward()
    optimizer.step()
    assert not moved(layer, before)


def step_plain(model: nn.Module, x: Tensor) -> None:
    loss_of(model, x).backward()


def step_micro_batches(model: nn.Module, x: Tensor) -> None:
    for part in x.chunk(4):
        (loss_of(model, part) / 4).backward()


def step_checkpointed(model: nn.Module, x: Tensor) -> None:
    loss_of(lambda y: checkpoint(model, y, use_reentrant=False), x).backward()  # type: ignore[arg-type]


def step_two_forwards(model: nn.Module, x: Tensor) -> None:
    (loss_of(model, x) + loss_of(model, x.flip(0))).backward()


def step_with_evaluation(model: nn.Module, x: Tensor) -> None:
    model.eval()
    with torch.no_grad():
        model(x)
    model.train()
    loss_of(model, x).backward()


@pytest.mark.parametrize(
    "step", [step_plain, step_micro_batches, step_checkpointed, step_two_forwards, step_with_evaluation]
)
def test_vectors_move_once_an_optimizer_step(step: Any) -> None:
    model = em.sigma_reparam(vit(), gamma="one")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        before = snapshot(model)
        step(model, images())
        assert not moved(model, before)
        optimizer.step()
        optimizer.zero_grad()
        expected = []
        for (_, scale), u, v in zip(scales_of(model), before[::2], before[1::2], strict=True):
            w = scale.weight.detach()
            u = torch.nn.functional.normalize(w @ v, dim=0)
            expected += [u, torch.nn.functional.normalize(w.t() @ u, dim=0)]
        for x, y in zip(snapshot(model), expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


def test_without_an_optimizer_the_first_forward_in_training_follows() -> None:
    model = em.sigma_reparam(vit(), gamma="one")
    for _ in range(2):
        loss_of(model, images()).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
                p.grad = None
        before = snapshot(model)
        model.eval()
        model(images())
        with torch.no_grad():
            model.train()(images())
        assert not moved(model, before)  # neither in eval nor without gradients
        model(images())
        assert moved(model, before)
        before = snapshot(model)
        model(images())
        assert not moved(model, before)


class Around(torch.optim.Optimizer):
    """An optimizer that steps another one, as sharded and look-ahead optimizers do."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure: Any = None) -> None:
        self.inner.step()


def test_an_optimizer_around_another_one_counts_once() -> None:
    twins = [em.sigma_reparam(vit(), gamma="one") for _ in range(2)]
    inner = [torch.optim.SGD(m.parameters(), lr=0.1) for m in twins]
    train_step(twins[0], inner[0])
    train_step(twins[1], Around(inner[1]))
    assert all(torch.equal(a, b) for a, b in zip(snapshot(twins[0]), snapshot(twins[1]), strict=True))


def test_another_models_optimizer_moves_nothing() -> None:
    model, other = em.sigma_reparam(vit(), gamma="one"), em.sigma_reparam(vit(seed=1), gamma="one")
    before = snapshot(model)
    train_step(other, torch.optim.SGD(other.parameters(), lr=0.1))
    assert not moved(model, before)


def test_a_copy_follows_its_own_weight() -> None:
    model = em.sigma_reparam(vit(), gamma="preserve")
    twin = copy.deepcopy(model)
    before = snapshot(model)
    train_step(twin, torch.optim.SGD(twin.parameters(), lr=0.1))
    assert not moved(model, before)
    train_step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert all(torch.equal(a, b) for a, b in zip(snapshot(model), snapshot(twin), strict=True))


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_models_compute_with_their_own_norms(use_buffers: bool) -> None:
    model = em.sigma_reparam(vit(), gamma="one")
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=use_buffers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    for _ in range(6):
        train_step(model, optimizer)
        average.update_parameters(model)
    average.eval()(images())
    for layer in linears(average.module):
        kept = layer.parametrizations.weight
        exact = kept[0].gamma / torch.linalg.matrix_norm(kept.original, 2) * kept.original
        torch.testing.assert_close(layer.weight, exact, rtol=1e-9, atol=1e-12)


def test_a_resumed_run_is_the_unbroken_one() -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
        return [train_step(model, optimizer) for _ in range(steps)]

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = em.sigma_reparam(vit(), gamma="one")
        return model, torch.optim.AdamW(em.param_groups(model, 1e-2))

    unbroken = run(*fresh(), 8)
    model, optimizer = fresh()
    run(model, optimizer, 4)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    model, optimizer = fresh()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert run(model, optimizer, 4) == unbroken[4:]


def test_compiled_training_is_one_graph_and_the_same() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    eager, model = (em.sigma_reparam(vit(), gamma="one") for _ in range(2))
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (eager, model)]
    for _ in range(4):
        a = train_step(eager, optimizers[0])
        b = train_step(compiled, optimizers[1])
        assert a == b
    assert counter.frame_count == 1
    assert all(torch.equal(a, b) for a, b in zip(snapshot(eager), snapshot(model), strict=True))


def test_functional_calls_move_nothing() -> None:
    model = em.sigma_reparam(vit(), gamma="one")
    parameters = {name: p.detach() * 1.5 for name, p in model.named_parameters()}
    before = snapshot(model)
    torch.func.functional_call(model, parameters, (images(),))
    gradients = torch.func.grad(lambda p: torch.func.functional_call(model, p, (images(),)).square().sum())(
        parameters
    )
    assert all(torch.isfinite(g).all() for g in gradients.values())
    assert not moved(model, before)


def test_assigning_a_weight_keeps_it() -> None:
    layer = em.sigma_reparam(nn.Linear(6, 4), gamma="one")
    new = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    layer.weight = new
    torch.testing.assert_close(layer.weight, new, rtol=1e-6, atol=0)
    (scale,) = (s for _, s in scales_of(layer))
    torch.testing.assert_close(scale.gamma[0], torch.linalg.matrix_norm(new, 2))


def test_it_says_what_it_is() -> None:
    assert "gamma=learned" in repr(SpectralScale(weight(3, 3), preserve=True))
    group = GROUPS["rows"]
    assert "groups=3, gamma=fixed" in repr(
        SpectralScale(weight(6, 5), preserve=False, learn=False, group=group)
    )


def test_checkpoints_without_buffers_are_loaded_with_their_own_norms() -> None:
    model = em.sigma_reparam(vit(), gamma="one")
    kept = {name: 7 * p.detach() + 1 if "original" in name else p for name, p in model.named_parameters()}
    model.load_state_dict(kept, strict=False)
    for layer in linears(model):
        torch.testing.assert_close(torch.linalg.matrix_norm(layer.weight, 2), layer.weight.new_ones(()))


def test_a_weight_without_numbers_comes_out_as_of_a_plain_layer() -> None:
    model = em.sigma_reparam(vit(), gamma="one").eval()
    (_, scale), *_ = scales_of(model)
    with torch.no_grad():
        scale.weight.fill_(torch.nan)
    assert model(images()).isnan().all()
    model.state_dict()
    copy.deepcopy(model)


def test_frozen_layers_stay_frozen() -> None:
    model = vit()
    model.embed.weight.requires_grad_(False)
    em.sigma_reparam(model, gamma="preserve")
    before = model.embed.weight.clone()
    train_step(model, torch.optim.AdamW(em.param_groups(model, 0.1)))
    assert torch.equal(model.embed.weight, before)


def test_updates_by_hand_after_a_torch_optimizer_are_followed() -> None:
    model = em.sigma_reparam(vit(), gamma="one")
    train_step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for i in range(6):
        before = snapshot(model)
        loss_of(model, images()).backward()
        assert moved(model, before) == (i >= 3)  # three forwards at new weights, and nobody said why
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.3 * p.grad
                p.grad = None


class ThereAndBack(torch.optim.SGD):
    """Perturbs the weights, evaluates there, and steps from where they were: a sharpness-aware optimizer."""

    def step(self, closure: Any = None) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        with torch.no_grad():
            for p in parameters:
                p += 0.01
        closure()
        with torch.no_grad():
            for p in parameters:
                p -= 0.01
        super().step()


def test_within_a_step_weights_may_go_there_and_back() -> None:
    model = em.sigma_reparam(vit(), gamma="one")
    optimizer = ThereAndBack(model.parameters(), lr=0.1)
    train_step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(4):
        before = snapshot(model)
        optimizer.step(lambda m=model, b=before: (loss_of(m, images()).backward(), moved(m, b)))
        for (_, scale), v in zip(scales_of(model), before[1::2], strict=True):
            u = torch.nn.functional.normalize(scale.weight.detach() @ v, dim=0)
            torch.testing.assert_close(scale.u, u, rtol=1e-12, atol=1e-14)
