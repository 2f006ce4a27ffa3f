from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import entropy_monitor as em
from tests.hooks.sources import xformers_stand_in as stand_in
from tests.hooks.sources.reference import B, D, H, K, Projected, T, check, check_model


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    with stand_in.installed():
        yield


class Efficient(Projected):
    def __init__(self, layout: str = "heads", queries: int = T, **options: Any) -> None:
        super().__init__(K if layout == "groups" else H)
        self.num_heads = H
        self.layout, self.queries, self.options = layout, queries, options

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x)
        q = q[:, : self.queries]
        if self.layout == "groups":
            k, v = (y.unsqueeze(3).expand(-1, -1, -1, H // K, -1) for y in (k, v))
            return q.unflatten(2, (K, H // K)), k, v
        if self.layout == "folded":
            q, k, v = (y.transpose(1, 2).reshape(-1, y.shape[1], D) for y in (q, k, v))
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        return self.out(
            stand_in.memory_efficient_attention(*self.parts(x), **self.options).reshape(len(x), -1, H * D)
        )

    def logits(self, x: Tensor) -> Tensor:
        q, k, _ = (y.detach() for y in self.parts(x))
        o = self.options
        u = stand_in.dense_logits(q, k, o.get("attn_bias"), o.get("scale"))
        return u.reshape(len(x), H, *u.shape[-2:])


def blocks(kind: type, keys: bool = False) -> Any:
    return kind(stand_in._Info([0, 4, 5, 11]), stand_in._Info([0, 3, 5, 11] if keys else [0, 4, 5, 11]))


BIASES: dict[str, Any] = {
    "none": None,
    "tensor": torch.randn(B, H, T, T),
    "one tensor for all": torch.randn(1, 1, T, T),
    "tensor that hides": torch.zeros(B, H, T, T).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf),
    "causal": stand_in.LowerTriangularMask(),
    "causal with tensor": stand_in.LowerTriangularMaskWithTensorBias(torch.randn(B, H, T, T)),
    "causal, lower right": stand_in.LowerTriangularFromBottomRightMask(),
    "local": stand_in.LocalAttentionFromBottomRightMask(2, 1),
    "unknown": stand_in.AnotherBias(),
}
FEWER = ("none", "causal", "causal, lower right", "local", "unknown")


@pytest.mark.parametrize("name", BIASES)
def test_biases(name: str) -> None:
    model, x = Efficient(attn_bias=BIASES[name], scale=0.5), torch.randn(B, T, H * D)
    table = check_model(model, (x,), model.logits(x))
    check(table, {"sigma_qk": model.sigma_qk()})
    assert table["floor_weights"].notna().all()
    assert (table["floor_row"] <= table["entropy"] + 1e-4).all()
    assert (table["floor_activation"] <= table["floor_row"] + 1e-4).all()


@pytest.mark.parametrize("name", FEWER)
def test_fewer_queries_than_keys(name: str) -> None:
    model, x = Efficient(attn_bias=BIASES[name], queries=6), torch.randn(B, T, H * D)
    check_model(model, (x,), model.logits(x))


@pytest.mark.parametrize("layout", ["groups", "folded"])
@pytest.mark.parametrize("bias", [None, stand_in.LowerTriangularMask()], ids=["none", "causal"])
def test_layouts(layout: str, bias: Any) -> None:
    model, x = Efficient(layout, attn_bias=bias), torch.randn(B, T, H * D)
    table = check_model(model, (x,), model.logits(x))
    if layout == "groups":
        check(table, {"sigma_qk": model.sigma_qk()})


def test_a_tensor_over_folded_heads() -> None:
    model, x = Efficient("folded", attn_bias=torch.randn(B * H, T, T)), torch.randn(B, T, H * D)
    check_model(model, (x,), model.logits(x))


KINDS = (
    stand_in.BlockDiagonalMask,
    stand_in.BlockDiagonalCausalMask,
    stand_in.BlockDiagonalCausalFromBottomRightMask,
    stand_in.BlockDiagonalCausalLocalAttentionMask,
)


@pytest.mark.parametrize("keys", [False, True], ids=["alike", "other lengths"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_sequences_one_after_the_other(kind: type, keys: bool) -> None:
    model, x = Efficient(attn_bias=blocks(kind, keys)), torch.randn(1, T, H * D)
    table = check_model(model, (x,), model.logits(x))
    assert (table["floor_weights"] <= table["floor_activation"] + 1e-4).all()


def test_paged_keys_are_told_to_be_unread() -> None:
    class Paged(Efficient):
        def logits(self, x: Tensor) -> Tensor:
            raise NotImplementedError

    model = Paged(attn_bias=blocks(stand_in.PagedBlockDiagonalPaddedKeysMask))
    with pytest.raises(em.AttentionNotFoundError, match="paged"):
        em.measure(model, torch.randn(1, T, H * D))


def test_training_step_is_the_same() -> None:
    model, x = Efficient(attn_bias=stand_in.LowerTriangularMask()), torch.randn(B, T, H * D)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(x).square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    with em.capture(model, rows="all") as seen:
        watched = gradients()
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert len(seen.heads) == H
