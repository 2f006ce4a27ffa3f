"""γ in optimizers, new and running."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

import entropy_monitor as em
from entropy_monitor.errors import ConfigurationError
from entropy_monitor.remedies.reparametrization.folding import scales_of
from tests.remedies.models import train_step, vit


def gammas(model: torch.nn.Module) -> set[int]:
    return {id(scale.gamma) for _, scale in scales_of(model)}


def test_gamma_has_a_group_of_its_own() -> None:
    model = em.sigma_reparam(vit(), gamma="one")
    rest, apart = em.param_groups(model, 1e-3, weight_decay=0.1)
    assert (rest["lr"], rest["weight_decay"]) == (1e-3, 0.1)
    assert (apart["lr"], apart["weight_decay"]) == (2e-3, 0.0)
    assert {id(p) for p in apart["params"]} == gammas(model)
    assert {id(p) for p in rest["params"]} | gammas(model) == {id(p) for p in model.parameters()}
    assert len(rest["params"]) + len(apart["params"]) == len(list(model.parameters()))
    torch.optim.AdamW([rest, apart])


def test_a_plain_model_has_one_group_and_frozen_parameters_none() -> None:
    model = vit()
    model.embed.weight.requires_grad_(False)
    (group,) = em.param_groups(model, 1e-3)
    assert not any(p is model.embed.weight for p in group["params"])


def test_spectral_norms_gamma_does_not_train() -> None:
    model = em.spectral_norm(vit())
    assert len(em.param_groups(model, 1e-3)) == 1


@pytest.mark.parametrize("name", ["lr", "gamma_lr", "weight_decay", "gamma_weight_decay"])
def test_negative_values_are_refused(name: str) -> None:
    values: dict[str, Any] = {"lr": 1e-3} | {name: -1.0}
    with pytest.raises(ConfigurationError, match=f"param_groups: {name} must not be negative, got -1.0"):
        em.param_groups(vit(), **values)


def test_a_run_converted_half_way_goes_on() -> None:
    model = vit()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        train_step(model, optimizer)
    state = {p: {k: v.clone() for k, v in optimizer.state[p].items()} for p in model.parameters()}
    loss = train_step(vit(), torch.optim.SGD([torch.zeros(1, requires_grad=True)]))  # warm, unrelated
    em.sigma_reparam(model, gamma="preserve")
    assert em.convert_optimizer(optimizer, model, gamma_lr=3.0) is optimizer
    for p, kept in state.items():
        assert all(torch.equal(optimizer.state[p][k], v) for k, v in kept.items())
    group = optimizer.param_groups[1]
    assert {id(p) for p in group["params"]} == gammas(model)
    assert (group["lr"], group["weight_decay"]) == (pytest.approx(3e-2), 0.0)
    losses = [train_step(model, optimizer) for _ in range(5)]
    assert losses[-1] < losses[0] < loss
    assert all(optimizer.state[scale.gamma]["step"] == 5 for _, scale in scales_of(model))


def test_converting_twice_adds_nothing() -> None:
    model = vit()
    optimizer = torch.optim.AdamW(model.parameters())
    em.convert_optimizer(optimizer, em.sigma_reparam(model, gamma="preserve"))
    em.convert_optimizer(optimizer, model)
    assert len(optimizer.param_groups) == 2


def test_groups_keep_their_options() -> None:
    model = vit()
    first, rest = list(model.blocks[0].parameters()), list(model.blocks[1].parameters())
    optimizer = torch.optim.AdamW(
        [{"params": first, "lr": 1e-3, "betas": (0.8, 0.9)}, {"params": rest}], lr=1e-2
    )
    em.sigma_reparam(model, gamma="preserve")
    em.convert_optimizer(optimizer, model)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([1e-3, 1e-2, 2e-3, 2e-2])
    assert optimizer.param_groups[2]["betas"] == (0.8, 0.9)
    assert [len(g["params"]) for g in optimizer.param_groups[2:]] == [6, 6]


def test_optimizers_with_named_parameters() -> None:
    model = vit()
    optimizer = torch.optim.AdamW(model.named_parameters())
    em.convert_optimizer(optimizer, em.sigma_reparam(model, gamma="preserve"))
    assert optimizer.param_groups[1]["param_names"][0] == "embed.weight.gamma"


SCHEDULERS: dict[str, Any] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
    "step": lambda o: lr_scheduler.StepLR(o, 2),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=20),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, cycle_momentum=False),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 20)], [3]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
}


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_drive_the_new_group_too(name: str) -> None:
    model = vit()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = SCHEDULERS[name](optimizer)
    for _ in range(2):
        train_step(model, optimizer)
        scheduler.step()
    em.sigma_reparam(model, gamma="preserve")
    em.convert_optimizer(optimizer, model, schedulers=[scheduler])
    for _ in range(5):
        train_step(model, optimizer)
        scheduler.step()
        rest, apart = (group["lr"] for group in optimizer.param_groups)
        assert apart == pytest.approx(2 * rest, rel=1e-9)


def test_plateaus_are_followed() -> None:
    model = vit()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    em.convert_optimizer(optimizer, em.sigma_reparam(model, gamma="preserve"), schedulers=[scheduler])
    for _ in range(3):
        train_step(model, optimizer)
        scheduler.step(1.0)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([2.5e-3, 5e-3])


def test_a_scheduler_that_is_not_given_is_asked_for() -> None:
    model = vit()
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = lr_scheduler.StepLR(optimizer, 2)
    em.sigma_reparam(model, gamma="preserve")
    with pytest.raises(ConfigurationError, match=r"give schedulers=\[scheduler\]"):
        em.convert_optimizer(optimizer, model)
    other = lr_scheduler.StepLR(torch.optim.SGD(vit().parameters()), 2)
    with pytest.raises(ConfigurationError, match="StepLR is not a scheduler of this optimizer"):
        em.convert_optimizer(optimizer, model, schedulers=[scheduler, other])
    assert len(optimizer.param_groups) == 1


def test_another_models_optimizer_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="holds no parameter of VisionTransformer"):
        em.convert_optimizer(torch.optim.SGD(vit().parameters()), vit(seed=1))


def test_after_folding_gamma_leaves_and_training_goes_on() -> None:
    model, other = em.sigma_reparam(vit(), gamma="one"), em.sigma_reparam(vit(seed=1), gamma="one")
    groups = em.param_groups(model, 1e-2) + em.param_groups(other, 1e-2)
    optimizer = torch.optim.AdamW(groups)
    train_step(model, optimizer)
    em.fold(model)
    em.convert_optimizer(optimizer, model)
    assert [len(g["params"]) for g in optimizer.param_groups][1] == 0
    assert {id(p) for p in optimizer.param_groups[3]["params"]} == gammas(other)  # another model's stay
    loss = train_step(model, optimizer)
    assert train_step(model, optimizer) < loss


def test_the_optimizers_own_weight_decay_is_kept() -> None:
    model = em.sigma_reparam(vit(), gamma="one")
    optimizer = torch.optim.AdamW(em.param_groups(model, 1e-3), weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_gamma_leaves_any_group_after_folding() -> None:
    model = em.sigma_reparam(vit(), gamma="one")
    optimizer = torch.optim.AdamW(model.parameters())
    em.convert_optimizer(optimizer, em.fold(model))
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}


def test_optimizers_that_cannot_take_gamma_are_refused() -> None:
    class Muon(torch.optim.SGD):
        pass

    for kind, why in ((torch.optim.LBFGS, "has one group"), (Muon, "takes matrices only")):
        model = vit()
        optimizer = kind(model.parameters(), lr=0.1)
        em.sigma_reparam(model, gamma="preserve")
        with pytest.raises(ConfigurationError, match=f"{kind.__name__} {why}"):
            em.convert_optimizer(optimizer, model)
        assert len(optimizer.param_groups) == 1


def test_weights_that_weight_norm_replaced_are_told() -> None:
    model = vit()
    optimizer = torch.optim.AdamW(model.parameters())
    em.weight_norm(model)
    with pytest.raises(ConfigurationError, match="original0 is a new parameter"):
        em.convert_optimizer(optimizer, model)


def test_an_optimizer_that_lacks_weights_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = vit()
    optimizer = torch.optim.AdamW(p for n, p in model.named_parameters() if n != "embed.weight")
    em.sigma_reparam(model, gamma="preserve")
    em.convert_optimizer(optimizer, model)
    assert "does not hold embed.weight, and so not its γ" in caplog.text
