from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import entropy_monitor as em
from tests.hooks.sources.reference import B, D, H, K, Projected, T, check, check_model, figures

SHIFT = 1.5  # some rows have nothing above it, and no head has nothing but such rows
SEEN = torch.ones(T, T).tril().bool()


class Hand(Projected):
    def __init__(self, weigh: Callable[[Tensor], Tensor], key_heads: int = H) -> None:
        super().__init__(key_heads)
        self.weigh, self.drop = weigh, nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in self.qkv(x))
        k, v = (y.repeat_interleave(H // y.shape[1], dim=1) for y in (k, v))
        a = self.drop(self.weigh(q @ k.transpose(-2, -1) * D**-0.5))
        return self.out((a @ v).transpose(1, 2).flatten(2))


def share(w: Tensor) -> Tensor:
    return w / w.sum(-1, keepdim=True).clamp(min=1e-30)


def hide(u: Tensor) -> Tensor:
    return u.masked_fill(~SEEN, -torch.inf)


def off_by_one(u: Tensor) -> Tensor:
    top = u.amax(-1, keepdim=True).clamp(min=0)
    e = torch.exp(u - top)
    return e / (torch.exp(-top) + e.sum(-1, keepdim=True))


def plain_softmax(u: Tensor) -> Tensor:
    e = torch.exp(u - u.amax(dim=-1, keepdim=True))
    return e / e.sum(dim=-1, keepdim=True)


# weights, label, which keys are seen
CASES: dict[str, tuple[Callable[[Tensor], Tensor], str, bool]] = {
    "relu over its sum": (lambda u: share(F.relu(u)), "relu", False),
    "relu by length": (lambda u: F.relu(u) / T, "relu (normalised)", False),
    "relu as clamp": (lambda u: share(u.clamp(min=0)), "relu", False),
    "relu squared": (lambda u: share(u.relu() ** 2), "relu", False),
    "relu, causal before": (lambda u: share(torch.relu(hide(u))), "relu", True),
    "relu, causal after": (lambda u: share(torch.relu(u).masked_fill(~SEEN, 0.0)), "relu", True),
    "relu, tril": (lambda u: share(torch.relu(u).tril()), "relu", True),
    "relu, times mask": (lambda u: share(torch.relu(u) * SEEN), "relu", True),
    "relu, where": (lambda u: share(torch.where(SEEN, torch.relu(u), 0.0)), "relu", True),
    "relu, normalize": (lambda u: F.normalize(torch.relu(u), p=1.0, dim=-1), "relu", False),
    "relu in place": (lambda u: share(F.relu_(u + 0)), "relu", False),
    "sigmoid": (lambda u: torch.sigmoid(u - 2.398), "sigmoid (normalised)", False),
    "sigmoid, causal": (lambda u: torch.sigmoid(hide(u)), "sigmoid (normalised)", True),
    "sigmoid over its sum": (lambda u: share(u.sigmoid()), "sigmoid", False),
    "softplus": (lambda u: share(F.softplus(u)), "softplus", False),
    "squares": (lambda u: share(u.square()), "square", False),
    "exp, off by one": (off_by_one, "exp (normalised)", False),
    "exp over its sum": (plain_softmax, "softmax", False),
    "exp, causal": (lambda u: plain_softmax(hide(u)), "softmax", True),
}


@pytest.mark.parametrize("key_heads", [H, K], ids=["heads alike", "grouped"])
@pytest.mark.parametrize("name", CASES)
def test_weights(name: str, key_heads: int) -> None:
    weigh, label, causal = CASES[name]
    model, x = Hand(weigh, key_heads).eval(), torch.randn(B, T, H * D)
    u = model.products(x)
    w = weigh(u)
    if name == "sigmoid":
        u = u - 2.398
    u = hide(u) if causal else u
    maps = w / w.sum(-1, keepdim=True).clamp(min=1e-300)
    table = check_model(model, (x,), u, None if label == "softmax" else maps, label)
    check(table, {"sigma_qk": model.sigma_qk()})
    floors = table[["floor_row", "floor_activation", "floor_weights", "floor_paper"]]
    assert floors.notna().all().all() if label == "softmax" else floors.isna().all().all()


def test_rows_that_attend_to_nothing_are_left_out() -> None:
    model, x = Hand(lambda u: share(F.relu(u - SHIFT))).eval(), torch.randn(B, T, H * D)
    with torch.no_grad():
        w = F.relu(model.products(x) - SHIFT)
    maps = w / w.sum(-1, keepdim=True).clamp(min=1e-300)
    empty = w.sum(-1) == 0
    assert empty.any()
    assert not empty.all(-1).any()
    table = check_model(model, (x,), model.products(x).detach() - SHIFT, maps, "relu")
    assert (table["rows_read"] < B * T).any()


def test_entropy_is_taken_before_dropout() -> None:
    model, x = Hand(lambda u: share(F.relu(u))).train(), torch.randn(B, T, H * D)
    w = F.relu(model.products(x))
    maps = w / w.sum(-1, keepdim=True)
    check(em.measure(model, x, rows="all"), figures(model.products(x), maps))


def test_half_precision() -> None:
    model = Hand(lambda u: share(F.relu(u))).eval().bfloat16()
    table = em.measure(model, torch.randn(B, T, H * D).bfloat16(), rows="all")
    assert set(table["attention"]) == {"relu"}


def test_training_is_the_same_and_values_and_outputs_are_known() -> None:
    model, x = Hand(lambda u: share(F.relu(u))).eval(), torch.randn(B, T, H * D)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(x).square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    with em.capture(model, rows="all") as seen:
        watched = gradients()
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    parts = seen._recorder.layers["Hand"]
    known = {role: part.parameter for role, part in parts.weights.items()}
    assert known["value"] is model.v.weight
    assert known["output"] is model.out.weight


class Others(nn.Module):
    """Gates, routers, squeeze-and-excite and MLPs: none of them attends."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(32, 32) for _ in range(3))
        self.router, self.experts = nn.Linear(32, 4), nn.Parameter(torch.randn(4, 32, 32))
        self.nodes = nn.Parameter(torch.randn(T, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(F.relu(self.a(x)))
        x = x * torch.sigmoid(self.c(x))
        x = x * torch.sigmoid(self.a(x.mean(1, keepdim=True)))
        gates = F.relu(self.router(x))
        x = torch.einsum(
            "bte,eij,bti->btj", gates / gates.sum(-1, keepdim=True).clamp(min=1e-6), self.experts, x
        )
        x = torch.sigmoid(self.router(x)) @ self.experts[:, 0]
        adjacency = F.relu(self.nodes @ self.nodes.T)
        x = adjacency @ x
        q, k = F.relu(x), F.relu(self.b(x))
        return q @ (k.transpose(1, 2) @ x)  # linear attention has no map


def test_what_only_looks_like_it() -> None:
    with pytest.raises(em.AttentionNotFoundError):
        em.measure(Others(), torch.randn(B, T, 32))


def test_a_softmax_is_read_once() -> None:
    class Both(Hand):
        def forward(self, x: Tensor) -> Any:
            first = super().forward(x)
            q, k, v = (y.transpose(1, 2) for y in self.qkv(first))
            return (q @ k.mT).softmax(-1) @ v

    table = em.measure(Both(lambda u: share(F.relu(u))).eval(), torch.randn(B, T, H * D))
    assert list(table["call"]) == [0] * H + [1] * H
    assert list(table["attention"]) == ["relu"] * H + ["softmax"] * H
