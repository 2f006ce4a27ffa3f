from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from entropy_monitor.guard import Guard
from entropy_monitor.hooks import Recorder, Watcher, WeightWatcher
from entropy_monitor.hooks.weights import UPDATE_FIGURES
from tests.training import (
    ATTENTIONS,
    WIDTH,
    FusedAttention,
    SeparateAttention,
    TorchAttention,
    batches,
    tiny,
)

Figures = dict[str, dict[str, float]]
Matrices = dict[str, Tensor]


class Watched:
    """A model with a watcher of its weights, armed for one step."""

    def __init__(self, model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
        self.recorder = Recorder("all")
        self.guard = Guard(strict=True)
        self.watcher = Watcher(model, self.recorder, self.guard)
        self.weights = WeightWatcher(optimizers, self.recorder.layers, self.guard)
        self.watcher.arm()
        self.weights.arm()

    def figures(self) -> Figures:
        self.watcher.disarm()
        names = list(self.recorder.layers)
        table = self.weights.figures(names, torch.device("cpu"))
        assert table.dtype == torch.float32
        self.weights.close()
        return {
            n: dict(zip(UPDATE_FIGURES, row.tolist(), strict=True))
            for n, row in zip(names, table, strict=True)
        }


@pytest.fixture(autouse=True)
def no_hooks_left() -> Iterator[None]:
    from torch.nn.modules import module

    yield
    assert not module._global_forward_hooks
    assert not module._global_forward_pre_hooks


def matrices(block: nn.Module) -> Matrices:
    """W_Q, W_K and the rest of a block's attention weights, float64."""
    parts: dict[type, Callable[[Any], list[Tensor]]] = {
        SeparateAttention: lambda m: [m.q.weight, m.k.weight, m.v.weight, m.o.weight],
        FusedAttention: lambda m: [*m.qkv.weight.chunk(3), m.proj.weight],
        TorchAttention: lambda m: [*m.mha.in_proj_weight.chunk(3), m.mha.out_proj.weight],
    }
    values = [w.detach().double().clone() for w in parts[type(block)](block)]
    return dict(zip(("q", "k", "v", "o"), values, strict=True))


def gradients(block: nn.Module) -> Tensor:
    """All gradients of the attention's weight matrices, float64."""
    return torch.cat(
        [
            p.grad.double().flatten()
            for n, p in block.named_parameters()
            if p.grad is not None and "weight" in n
        ]
    )


def spectrum_figures(before: Matrices, after: Matrices) -> dict[str, float]:
    """The oracle: all singular values of both updates together."""
    updates = [after[r] - before[r] for r in ("q", "k")]
    values = torch.cat([torch.linalg.svdvals(u) for u in updates])
    p = values.square() / values.square().sum()
    return {
        "update_sigma": float(values.max()),
        "update_entropy": float(-(p * p.clamp(min=1e-300).log()).sum()),
    }


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Name of the module that owns the attention, to the block."""
    inner = {TorchAttention: ".mha"}
    return {f"blocks.{i}{inner.get(type(b), '')}": b for i, b in enumerate(model.blocks)}


def expect(figures: Figures, model: nn.Module, before: dict[str, Matrices], grads: dict[str, Tensor]) -> None:
    assert list(figures) == list(before)
    for name, block in blocks_of(model).items():
        wanted = {
            "grad_linf": float(grads[name].abs().max()),
            "grad_l2": float(grads[name].square().sum().sqrt()),
            **spectrum_figures(before[name], matrices(block)),
        }
        assert figures[name] == pytest.approx(wanted, rel=2e-4), name


def backward(model: nn.Module, data: Iterator[tuple[Tensor, Tensor]], scale: float = 1.0) -> None:
    x, y = next(data)
    (scale * F.cross_entropy(model(x), y)).backward()


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, 0.1), lambda p: torch.optim.AdamW(p, 0.01)])
def test_gradients_and_updates(
    attention: type[nn.Module], make: Callable[..., torch.optim.Optimizer]
) -> None:
    model = tiny(attention)
    optimizer = make(model.parameters())
    watched = Watched(model, optimizer)
    backward(model, batches())
    before = {n: matrices(b) for n, b in blocks_of(model).items()}
    grads = {n: gradients(b) for n, b in blocks_of(model).items()}
    optimizer.step()
    optimizer.zero_grad()  # what was read does not hang on the gradients
    expect(watched.figures(), model, before, grads)


def test_after_accumulation_and_clipping() -> None:
    model, data = tiny(), batches()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watched = Watched(model, optimizer)
    for _ in range(3):
        backward(model, data, scale=10.0)
    loud = max(float(gradients(b).abs().max()) for b in blocks_of(model).values())
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    before = {n: matrices(b) for n, b in blocks_of(model).items()}
    grads = {n: gradients(b) for n, b in blocks_of(model).items()}
    optimizer.step()
    figures = watched.figures()
    expect(figures, model, before, grads)
    assert max(f["grad_linf"] for f in figures.values()) < 0.01 < loud


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_unscaled(fused: bool) -> None:
    model, plain = tiny(), tiny()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, fused=fused)
    watched = Watched(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    x, y = next(batches())
    scaler.scale(F.cross_entropy(model(x), y)).backward()
    F.cross_entropy(plain(x), y).backward()
    scaler.step(optimizer)
    figures = watched.figures()
    for name, block in blocks_of(plain).items():
        grads = gradients(block)
        assert figures[name]["grad_linf"] == pytest.approx(float(grads.abs().max()), rel=1e-4)
        assert figures[name]["grad_l2"] == pytest.approx(float(grads.square().sum().sqrt()), rel=1e-4)


class Unscaling(torch.optim.Optimizer):
    """Unscales within its step, in place, as fused steps do."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.div_(self.grad_scale)
                p.sub_(p.grad)


def test_a_step_that_unscales_inside() -> None:
    """An optimizer with `grad_scale` divides by it: so must what is read."""
    model = tiny()
    optimizer = Unscaling(model.parameters(), {})
    watched = Watched(model, optimizer)
    backward(model, batches(), scale=64.0)
    optimizer.grad_scale = torch.tensor(64.0)
    before = {n: matrices(b) for n, b in blocks_of(model).items()}
    grads = {n: gradients(b) / 64 for n, b in blocks_of(model).items()}
    optimizer.step()
    expect(watched.figures(), model, before, grads)


def test_a_step_that_the_scaler_skips_is_not_known() -> None:
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watched = Watched(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    x, y = next(batches())
    scaler.scale(F.cross_entropy(model(x), y) * 1e30).backward()
    scaler.step(optimizer)
    for row in watched.figures().values():
        assert all(math.isnan(v) for v in row.values())


def test_a_closure_makes_its_gradients_within_the_step() -> None:
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, y = next(batches())
    backward(model, batches(7), scale=100.0)  # stale gradients, which the closure clears
    watched = Watched(model, optimizer)
    F.cross_entropy(model(x), y)  # the layers are known from here on
    before = {n: matrices(b) for n, b in blocks_of(model).items()}

    def closure() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    grads = {n: gradients(b) for n, b in blocks_of(model).items()}
    expect(watched.figures(), model, before, grads)


def test_several_optimizers_share_a_layer() -> None:
    model = tiny()
    queries = [p for n, p in model.named_parameters() if ".q." in n]
    others = [p for n, p in model.named_parameters() if ".q." not in n]
    one, two = torch.optim.SGD(queries, 0.5), torch.optim.AdamW(others, 0.01)
    watched = Watched(model, one, two)
    backward(model, batches())
    before = {n: matrices(b) for n, b in blocks_of(model).items()}
    grads = {n: gradients(b) for n, b in blocks_of(model).items()}
    one.step()
    two.step()
    expect(watched.figures(), model, before, grads)


def test_frozen_weights_are_not_known() -> None:
    model = tiny()
    for p in model.blocks[0].parameters():
        p.requires_grad_(False)
    for p in model.blocks[1].k.parameters():
        p.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watched = Watched(model, optimizer)
    backward(model, batches())
    optimizer.step()
    figures = watched.figures()
    assert all(math.isnan(v) for v in figures["blocks.0"].values())
    half = figures["blocks.1"]
    assert half["grad_linf"] == pytest.approx(float(gradients(model.blocks[1]).abs().max()))
    assert math.isnan(half["update_sigma"])
    assert math.isnan(half["update_entropy"])


def test_with_no_layer_to_read_nothing_is_looked_at() -> None:
    weights = WeightWatcher([], {}, Guard())
    for only, armed in ((None, True), (frozenset({"a"}), True), (frozenset(), False)):
        weights.arm(only)
        assert weights.armed == armed
    figures = weights.figures(["a", "b"], torch.device("cpu"))
    assert figures.shape == (2, 4)
    assert figures.isnan().all()


def test_without_an_optimizer_nothing_is_known() -> None:
    model = tiny()
    watched = Watched(model)
    backward(model, batches())
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert all(math.isnan(v) for row in watched.figures().values() for v in row.values())


def test_a_zero_update_has_no_entropy() -> None:
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    watched = Watched(model, optimizer)
    backward(model, batches())
    optimizer.step()
    for row in watched.figures().values():
        assert row["update_sigma"] == 0
        assert math.isnan(row["update_entropy"])
        assert row["grad_l2"] > 0


def test_gradients_that_are_not_finite_are_told() -> None:
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watched = Watched(model, optimizer)
    backward(model, batches())
    model.blocks[0].q.weight.grad[0, 0] = math.inf
    optimizer.step()
    assert watched.figures()["blocks.0"]["grad_linf"] == math.inf


def test_nothing_is_read_or_held_while_it_is_not_armed() -> None:
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watched = Watched(model, optimizer)
    backward(model, batches())
    watched.weights.disarm()
    optimizer.step()
    assert watched.weights._gradients == {}
    assert watched.weights._before == {}
    assert all(math.isnan(v) for row in watched.figures().values() for v in row.values())


def test_a_second_step_counts_alone() -> None:
    model, data = tiny(), batches()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watched = Watched(model, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        backward(model, data)
        before = {n: matrices(b) for n, b in blocks_of(model).items()}
        grads = {n: gradients(b) for n, b in blocks_of(model).items()}
        optimizer.step()
    expect(watched.figures(), model, before, grads)


def test_the_optimizer_is_left_as_it_was() -> None:
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    state, keys = copy.deepcopy(optimizer.state_dict()), set(vars(optimizer))
    watched = Watched(model, optimizer)
    twin = copy.deepcopy(optimizer)
    assert not twin._optimizer_step_pre_hooks
    watched.weights.close()
    watched.watcher.disarm()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert optimizer.state_dict() == state
    assert set(vars(optimizer)) == keys


def test_a_flattened_parameter_is_not_read() -> None:
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watched = Watched(model, optimizer)
    backward(model, batches())
    sharded = model.blocks[0].q.weight
    sharded.data = sharded.data.flatten()[: WIDTH * 2]
    sharded.grad = None
    sharded.grad = torch.ones(WIDTH * 2)
    optimizer.step()
    rows = watched.figures()
    # The norms of the layer's other weights are not the layer's.
    assert all(math.isnan(figure) for figure in rows["blocks.0"].values())
    assert not math.isnan(rows["blocks.1"]["grad_linf"])
