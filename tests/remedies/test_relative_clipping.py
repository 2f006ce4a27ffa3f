from __future__ import annotations

import math
import multiprocessing
import os
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.measures import equilibrium_gradient_norm, equilibrium_norm
from entropy_monitor.remedies.scale_invariance.clipping import RelativeClip, relative_global_clip_

LR, DECAY = 0.1, 0.02
FOREACH = pytest.mark.parametrize("foreach", [None, True, False])


def parameters(size: float = 1.0, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    """Some with a gradient of about `size` an entry, one without."""
    made = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((3, 4), (5,), (), (0, 2), (2, 2))]
    for p in made[:-1]:
        p.grad = (torch.randn(p.shape) * size).to(dtype)
    return made


def norm_of(tensors: Any) -> float:
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))


def gradients(some: list[nn.Parameter]) -> list[Tensor]:
    return [p.grad.clone() for p in some if p.grad is not None]


def unchanged(some: list[nn.Parameter], before: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(gradients(some), before, strict=True))


@FOREACH
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_the_formula(size: float, foreach: bool | None) -> None:
    some = parameters(size)
    before = gradients(some)
    limit = math.sqrt(2 * 3.0 * DECAY / LR) * norm_of(some[:-1])  # just those that have a gradient
    found = relative_global_clip_(iter(some), LR, DECAY, C=3.0, foreach=foreach)
    assert isinstance(found, RelativeClip)
    assert [t.dim() for t in found] == [0, 0, 0]
    assert found.clipped.dtype == torch.bool
    assert float(found.norm) == pytest.approx(norm_of(before), rel=1e-14)
    assert float(found.max_norm) == pytest.approx(limit, rel=1e-14)
    assert bool(found.clipped) == (norm_of(before) > limit)
    factor = min(1.0, limit / norm_of(before))
    for p, was in zip(some, before, strict=False):
        torch.testing.assert_close(p.grad, was * factor, rtol=1e-14, atol=0.0)
    if not found.clipped:
        assert unchanged(some, before)
    assert some[-1].grad is None


@FOREACH
def test_it_is_clip_grad_norm_with_that_norm(foreach: bool | None) -> None:
    some = parameters(50.0)
    twins = [nn.Parameter(p.detach().clone()) for p in some]
    for p, twin in zip(some, twins, strict=True):
        twin.grad = None if p.grad is None else p.grad.clone()
    limit = math.sqrt(4 * DECAY / LR) * norm_of(some[:-1])
    found = relative_global_clip_(some, LR, DECAY, foreach=foreach)
    norm = torch.nn.utils.clip_grad_norm_(twins, limit)
    torch.testing.assert_close(found.norm, norm, rtol=1e-14, atol=0.0)
    for p, twin in zip(some, twins, strict=True):  # torch adds 1e-6 to the norm that it divides by
        if p.grad is not None:
            torch.testing.assert_close(p.grad, twin.grad, rtol=1.1e-6 / float(norm), atol=0.0)


def test_twice_is_once() -> None:
    some = parameters(50.0, torch.float32)
    assert relative_global_clip_(some, LR, DECAY).clipped
    assert (
        relative_global_clip_(some, LR, DECAY).norm
        <= relative_global_clip_(some, LR, DECAY).max_norm * 1.000001
    )


@pytest.mark.parametrize("kind", ["optimizer", "groups", "one group", "tensor", "tensors"])
def test_what_parameters_may_be(kind: str) -> None:
    some = parameters(50.0)
    optimizer = torch.optim.SGD(some, lr=LR, weight_decay=DECAY)
    before = gradients(some)
    given, rates = {
        "optimizer": (optimizer, ()),
        "groups": (optimizer.param_groups, ()),
        "one group": ({"params": (p for p in some), "lr": LR, "weight_decay": DECAY}, ()),
        "tensor": (some[0], (LR, DECAY)),
        "tensors": ((p for p in [*some, some[0]]), (LR, DECAY)),  # a tied one counts once
    }[kind]
    which = some[:1] if kind == "tensor" else some[:-1]
    found = relative_global_clip_(given, *rates)
    assert float(found.norm) == pytest.approx(norm_of(before[: len(which)]), rel=1e-14)
    assert float(found.max_norm) == pytest.approx(math.sqrt(4 * DECAY / LR) * norm_of(which), rel=1e-14)


def test_given_rates_win_over_those_of_groups() -> None:
    some = parameters(50.0)
    optimizer = torch.optim.SGD(some, lr=5.0, weight_decay=0.0)
    found = relative_global_clip_(optimizer, LR, DECAY)
    assert float(found.max_norm) == pytest.approx(math.sqrt(4 * DECAY / LR) * norm_of(some[:-1]), rel=1e-14)


def groups_of(some: list[nn.Parameter], *rates: tuple[Any, Any]) -> list[dict[str, Any]]:
    return [
        {"params": [p], "lr": lr, "weight_decay": decay} for p, (lr, decay) in zip(some, rates, strict=False)
    ]


def test_groups_that_are_alike_are_one() -> None:
    rates = (LR, DECAY)
    one, other = parameters(50.0), []
    for p in one:
        other.append(nn.Parameter(p.detach().clone()))
        other[-1].grad = None if p.grad is None else p.grad.clone()
    found = relative_global_clip_(groups_of(one, rates, rates, rates, rates, rates))
    want = relative_global_clip_(other, *rates)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    # Tensors cannot be compared without waiting: the general formula, and the same figures.
    tensors = (torch.tensor(LR, dtype=torch.float64), torch.tensor(DECAY, dtype=torch.float64))
    again = relative_global_clip_(groups_of(one, rates, tensors, rates, rates, rates))
    torch.testing.assert_close(again.max_norm, want.max_norm, rtol=1e-14, atol=0.0)


@FOREACH
def test_groups_that_differ_balance_what_decay_takes_and_gradients_add(foreach: bool | None) -> None:
    some = parameters(50.0)[:2]
    rates = ((0.1, 0.02), (0.5, 0.003))
    before = gradients(some)
    found = relative_global_clip_(groups_of(some, *rates), C=1.5, foreach=foreach)
    assert found.clipped
    added = sum(lr**2 * norm_of([p.grad]) ** 2 for p, (lr, _) in zip(some, rates, strict=True))
    taken = sum(2 * lr * decay * norm_of([p]) ** 2 for p, (lr, decay) in zip(some, rates, strict=True))
    assert added == pytest.approx(1.5 * taken, rel=1e-13)
    assert norm_of(gradients(some)) == pytest.approx(float(found.max_norm), rel=1e-13)
    factors = [p.grad / was for p, was in zip(some, before, strict=True)]
    torch.testing.assert_close(factors[0].mean(), factors[1].mean(), rtol=1e-13, atol=0.0)


def test_the_balance_is_that_of_real_steps() -> None:
    # At the limit with C → 1, SGD with weight decay leaves the norm as it is, to first order in ηλ.
    some = parameters(50.0)[:2]
    for p in some:  # as gradients of scale-invariant parameters are: orthogonal to each group
        p.grad -= p.detach() * (p.detach() * p.grad).sum() / p.detach().square().sum()
    groups = groups_of(some, (0.01, 0.002), (0.05, 0.0003))
    optimizer = torch.optim.SGD(groups, lr=1.0)
    size = norm_of(some) ** 2
    assert relative_global_clip_(optimizer, C=1 + 1e-12).clipped
    optimizer.step()
    taken = 2 * sum(g["lr"] * g["weight_decay"] * norm_of(g["params"]) ** 2 for g in groups)
    assert abs(norm_of(some) ** 2 - size) < 1e-3 * taken


@pytest.mark.parametrize("rate", [0.0, torch.tensor(0.0)])
def test_a_learning_rate_of_0_clips_nothing(rate: Any) -> None:
    some = parameters(50.0)
    before = gradients(some)
    found = relative_global_clip_(some, rate, DECAY)
    assert found.max_norm == math.inf
    assert not found.clipped
    assert unchanged(some, before)
    found = relative_global_clip_(groups_of(some, (rate, DECAY), (rate, 2 * DECAY)))
    assert (float(found.max_norm), bool(found.clipped)) == (math.inf, False)
    one = parameters(50.0)  # one group of several: it has no say
    before = gradients(one)
    found = relative_global_clip_(groups_of(one, (LR, DECAY), (rate, DECAY)))
    factor = math.sqrt(4 * DECAY / LR) * norm_of(one[:1]) / norm_of(before[:1])
    torch.testing.assert_close(one[0].grad, before[0] * factor, rtol=1e-7, atol=0.0)


def test_rates_as_tensors() -> None:
    some, twins = parameters(50.0), []
    for p in some:
        twins.append(nn.Parameter(p.detach().clone()))
        twins[-1].grad = None if p.grad is None else p.grad.clone()
    rates = (torch.tensor(LR, dtype=torch.float64), torch.tensor([DECAY], dtype=torch.float64))
    found = relative_global_clip_(torch.optim.SGD(some, lr=rates[0]), weight_decay=rates[1])
    want = relative_global_clip_(twins, LR, DECAY)
    torch.testing.assert_close(found, want, rtol=1e-14, atol=0.0)


def test_the_gradients_of_the_equilibrium_are_left_alone() -> None:
    some = parameters()[:1]
    some[0].grad *= equilibrium_gradient_norm(LR, DECAY, norm_of(some)) / norm_of([some[0].grad])
    assert not relative_global_clip_(some, LR, DECAY, C=1.0001).clipped
    some[0].grad *= 1.01 * math.sqrt(2)
    assert relative_global_clip_(some, LR, DECAY).clipped


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@FOREACH
def test_low_precision_is_summed_in_float32(dtype: torch.dtype, foreach: bool | None) -> None:
    some = parameters(50.0, dtype)
    some[0].grad.fill_(3e4)  # its square is no float16
    before = gradients(some)
    found = relative_global_clip_([*some, *parameters(1.0, torch.float32)[:1]], LR, DECAY, foreach=foreach)
    assert found.norm.dtype == torch.float32
    assert float(found.norm) == pytest.approx(norm_of(before), rel=1e-4)
    assert some[0].grad.dtype == dtype
    want = before[0].double() * float(found.max_norm / found.norm)
    torch.testing.assert_close(some[0].grad.double(), want, rtol=1e-2, atol=0.0)


def test_nothing_to_clip() -> None:
    for some in ([], [nn.Parameter(torch.ones(3))]):
        found = relative_global_clip_(some, LR, DECAY)
        assert (float(found.norm), float(found.max_norm), bool(found.clipped)) == (0.0, 0.0, False)
    zero = nn.Parameter(torch.ones(3))
    zero.grad = torch.zeros(3)
    other = nn.Parameter(torch.ones(3))
    other.grad = torch.zeros(3)
    assert not relative_global_clip_(groups_of([zero, other], (LR, DECAY), (LR, 2 * DECAY))).clipped
    assert zero.grad.tolist() == [0.0] * 3


def test_norms_that_are_not_finite() -> None:
    some = parameters()
    some[0].grad[0, 0] = math.nan
    before = gradients(some)
    found = relative_global_clip_(some, LR, DECAY)
    assert found.norm.isnan()
    assert not found.clipped
    assert torch.equal(some[1].grad, before[1])
    with pytest.raises(RuntimeError, match="the norm of the gradients is nan"):
        relative_global_clip_(some, LR, DECAY, error_if_nonfinite=True)
    some = parameters(dtype=torch.float32)
    some[0].grad.fill_(1e30)  # finite, but no norm of float32
    assert relative_global_clip_(some, LR, DECAY).clipped
    assert not some[0].grad.any()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "C of 1": ({"C": 1.0}, "C must be a number above 1, got 1.0.*2 is the paper's"),
    "C NaN": ({"C": math.nan}, "C must be a number above 1, got nan"),
    "C bool": ({"C": True}, "C must be a number above 1, got True"),
    "no decay": (
        {"weight_decay": 0.0},
        r"group 0 \(first parameter of shape \[3, 4\]\): weight_decay must be above 0, got 0",
    ),
    "decay below 0": ({"weight_decay": -0.1}, "weight_decay must be above 0, got -0.1.*give the group one"),
    "decay tensor": ({"weight_decay": torch.tensor(0.0)}, "weight_decay must be above 0, got 0"),
    "decay missing": ({"weight_decay": None}, "has no weight decay; pass weight_decay="),
    "lr below 0": ({"lr": -0.1}, "lr must be 0 or more, got -0.1"),
    "lr NaN": ({"lr": math.nan}, "lr must be 0 or more, got nan"),
    "lr missing": ({"lr": None}, "has no learning rate; pass lr="),
    "lr of two": ({"lr": torch.ones(2)}, r"lr must be one number, got a tensor of shape \[2\]"),
    "C text": ({"C": "2"}, "C must be a number above 1, got '2'"),
    "foreach text": ({"foreach": "x"}, "foreach must be True, False or None, got 'x'"),
    "foreach number": ({"foreach": 1}, "foreach must be True, False or None, got 1"),
    "lr bool": ({"lr": True}, "lr must be a number or a tensor, got True"),
    "lr a text": ({"lr": "0.1"}, "lr must be a number or a tensor, got '0.1'"),
}


@pytest.mark.parametrize("number", [np.float32, np.float64, np.int64, Fraction])
def test_any_real_number_is_taken(number: Any) -> None:
    some = parameters(50.0)
    limit = math.sqrt(2 * 2 * 3 / 4) * norm_of(some[:-1])
    found = relative_global_clip_(some, number(4), number(3), C=number(2))
    assert float(found.max_norm) == pytest.approx(limit, rel=1e-14)


@pytest.mark.parametrize("case", BAD)
def test_errors_leave_gradients_alone(case: str) -> None:
    options, message = BAD[case]
    some = parameters(50.0)
    before = gradients(some)
    with pytest.raises(ConfigurationError, match=message):
        relative_global_clip_(some, **{"lr": LR, "weight_decay": DECAY, **options})
    assert unchanged(some, before)


def test_the_group_is_named() -> None:
    some = parameters(50.0)
    before = gradients(some)
    groups = groups_of(some, (LR, DECAY), (LR, 0.0))
    with pytest.raises(ConfigurationError, match=r"group 1 \(first parameter of shape \[5\]\): weight_decay"):
        relative_global_clip_(groups)
    assert unchanged(some, before)
    some[1].requires_grad_(False).grad = None  # a frozen group is not trained, and may have no decay
    assert relative_global_clip_(groups).clipped


def test_gradients_that_cannot_be_clipped() -> None:
    embedding, linear = nn.Embedding(5, 2, sparse=True), nn.Linear(2, 2)
    linear(embedding(torch.tensor([1]))).sum().backward()
    before = linear.weight.grad.clone()
    with pytest.raises(
        ConfigurationError, match=r"group 0.*parameter of shape \[5, 2\] is sparse.*sparse=False"
    ):
        relative_global_clip_([*linear.parameters(), *embedding.parameters()], LR, DECAY)
    assert torch.equal(linear.weight.grad, before)
    wave = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    wave.grad = torch.ones_like(wave)
    with pytest.raises(ConfigurationError, match=r"shape \[2\] is complex"):
        relative_global_clip_(wave, LR, DECAY)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (nn.Linear(2, 2).named_parameters(), "got tuple in group 0; pass model.parameters"),
        ({"parameters": []}, "a dict with 'params', got one with"),
        ([{"params": []}, torch.ones(2)], "got Tensor at 1"),
        (nn.Linear(2, 2), r"expected tensors, got the module Linear; pass model\.parameters\(\)"),
        (nn.Sequential(nn.Linear(2, 2)), "got the module Sequential; pass model"),  # which can be iterated
        (None, "expected tensors, got None; pass model"),
        (3, "expected tensors, got 3; pass model"),
        ({"params": None}, "expected tensors, got None in group 0; pass model"),
        ([{"params": nn.Linear(2, 2)}], "got the module Linear in group 0; pass model"),
    ],
)
def test_other_things_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        relative_global_clip_(given, LR, DECAY)


def test_it_stabilises_a_run_of_spikes() -> None:
    """Scale-invariant parameters with rare gradients 30 times as long: the norm stays where it was."""

    def norms(clip: bool) -> list[float]:
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(50, generator=generator)
        x = nn.Parameter(start / start.norm() * equilibrium_norm(LR, DECAY, 1.0))
        optimizer = torch.optim.SGD([x], lr=LR, weight_decay=DECAY)
        found = []
        for step in range(500):
            g = torch.randn(50, generator=generator)
            g -= x.detach() * (x.detach() @ g) / x.detach().square().sum()
            x.grad = g / g.norm() / x.detach().norm() * (30 if step % 100 == 99 else 1)
            if clip:
                relative_global_clip_(optimizer)
            optimizer.step()
            found.append(float(x.detach().norm()))
        return found

    plain, clipped = norms(False), norms(True)
    assert max(clipped) / min(clipped) < 1.02
    assert max(plain) / min(plain) > 1.2


def _sharded(rank: int, meeting: str, results: Any) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).double()
    whole = [p.detach().clone() for p in layers.parameters()]
    grads = [torch.randn_like(p) * 50 for p in whole]
    fully_shard(layers, mesh=mesh)
    sharded = list(layers.parameters())
    mixed = [
        nn.Parameter(p if place is None else distribute_tensor(p, mesh, [place]))
        for p, place in zip(whole, (Shard(1), Replicate(), Shard(0), None), strict=True)
    ]
    found = []
    for some in (sharded, mixed):
        for foreach in (None, False):
            for p, g in zip(some, grads, strict=True):
                if hasattr(p, "placements"):
                    p.grad = distribute_tensor(g.clone(), mesh, p.placements)
                else:
                    p.grad = g.clone()
            clip = relative_global_clip_(some, LR, DECAY, foreach=foreach)
            after = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in some]
            found.append(([t.item() for t in clip], [g.numpy() for g in after]))
    results.put((rank, [p.numpy() for p in whole], [g.numpy() for g in grads], found))
    dist.destroy_process_group()


def test_sharded_parameters_are_measured_whole(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
        processes = [
            context.Process(target=_sharded, args=(rank, str(tmp_path / "meeting"), results), daemon=True)
            for rank in range(2)
        ]
        for process in processes:
            process.start()
    try:
        ranks = [results.get(timeout=120) for _ in processes]
    finally:
        for process in processes:
            process.join(20)
            process.kill()
    for _, values, grads, found in ranks:
        alone = [nn.Parameter(torch.from_numpy(v)) for v in values]
        for p, g in zip(alone, grads, strict=True):
            p.grad = torch.from_numpy(g.copy())
        want = relative_global_clip_(alone, LR, DECAY)
        assert want.clipped
        assert len(found) == 4
        for clip, after in found:
            assert clip == pytest.approx([t.item() for t in want], rel=1e-13)
            for p, g in zip(alone, after, strict=True):
                torch.testing.assert_close(torch.from_numpy(g), p.grad, rtol=1e-13, atol=0.0)
