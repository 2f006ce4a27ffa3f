from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import entropy_monitor as em
from tests.hooks.sources import flash_stand_in as stand_in
from tests.hooks.sources.reference import B, D, H, K, Projected, T, check, check_model, figures

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    with stand_in.installed():
        yield


class Flash(Projected):
    """`keys` and `queries`: how many of the tokens each takes; `function`: a public one, bound early."""

    function: Callable[..., Tensor] = staticmethod(stand_in.flash_attn_func)

    def __init__(
        self, packing: str = "", key_heads: int = H, queries: int = T, keys: int = T, **options: Any
    ):
        super().__init__(key_heads)
        self.packing, self.queries, self.keys, self.options = packing, queries, keys, options

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x)
        return q[:, : self.queries], k[:, : self.keys], v[:, : self.keys]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        if self.packing == "qkv":
            out = stand_in.flash_attn_qkvpacked_func(torch.stack([q, k, v], 2), **self.options)
        elif self.packing == "kv":
            out = stand_in.flash_attn_kvpacked_func(q, torch.stack([k, v], 2), **self.options)
        else:
            out = self.function(q, k, v, **self.options)
        return self.out(out.flatten(2))

    def logits(self, x: Tensor) -> Tensor:
        q, k, _ = (y.detach() for y in self.parts(x))
        o = self.options
        slopes = o.get("alibi_slopes")
        return torch.stack(
            [
                stand_in.dense_logits(
                    q[n],
                    k[n],
                    o.get("softmax_scale"),
                    o.get("causal", False),
                    o.get("window_size", (-1, -1)),
                    o.get("softcap", 0.0),
                    slopes if slopes is None or slopes.dim() == 1 else slopes[n],
                )
                for n in range(len(x))
            ]
        )


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "more keys than queries": {"causal": True, "queries": 4},
    "more queries than keys": {"causal": True, "keys": 5},  # its first rows see nothing
    "window": {"window_size": (3, 1)},
    "causal window": {"causal": True, "window_size": (2, 2), "queries": 6},
    "left open": {"window_size": (-1, 2)},
    "soft-cap": {"softcap": 2.0, "softmax_scale": 0.8, "causal": True},
    "alibi": {"alibi_slopes": SLOPES, "causal": True, "queries": 7},
    "alibi of each sequence": {"alibi_slopes": torch.stack([SLOPES, SLOPES.flip(0)]), "softcap": 3.0},
}


@pytest.mark.parametrize("key_heads", [H, K], ids=["heads alike", "grouped"])
@pytest.mark.parametrize("case", OPTIONS)
def test_batched(case: str, key_heads: int) -> None:
    model, x = Flash(key_heads=key_heads, **OPTIONS[case]), torch.randn(B, T, H * D)
    table = check_model(model, (x,), model.logits(x))
    check(table, {"sigma_qk": model.sigma_qk()})
    assert table["floor_activation"].notna().all()
    assert (table["floor_row"] <= table["entropy"] + 1e-4).all()
    assert (table["floor_activation"] <= table["floor_row"] + 1e-4).all()
    assert not (table["floor_weights"] > table["floor_activation"] + 1e-4).any()
    assert table["floor_weights"].isna().all() == ("softcap" in OPTIONS[case])


@pytest.mark.parametrize("packing", ["qkv", "kv"])
def test_packed_arguments(packing: str) -> None:
    model, x = Flash(packing, causal=True), torch.randn(B, T, H * D)
    check_model(model, (x,), model.logits(x))


class Varlen(Flash):
    """Sequences of 4, 1 and 6 queries, and of as many or more keys, one after the other."""

    starts, starts_k = (
        torch.tensor([0, 4, 5, 11], dtype=torch.int32),
        torch.tensor([0, 5, 6, 13], dtype=torch.int32),
    )

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (y[0] for y in self.qkv(x))
        return q[:11], k[:13], v[:13]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        if self.packing == "qkv":
            out = stand_in.flash_attn_varlen_qkvpacked_func(
                torch.stack([q, k[:11], v[:11]], 1), self.starts, 6, **self.options
            )
        elif self.packing == "kv":
            out = stand_in.flash_attn_varlen_kvpacked_func(
                q, torch.stack([k, v], 1), self.starts, self.starts_k, 6, 7, **self.options
            )
        else:
            out = stand_in.flash_attn_varlen_func(q, k, v, self.starts, self.starts_k, 6, 7, **self.options)
        return self.out(out.flatten(1))

    def logits(self, x: Tensor) -> Tensor:
        q, k, _ = (y.detach() for y in self.parts(x))
        starts_k, longest = (self.starts, 6) if self.packing == "qkv" else (self.starts_k, 7)
        o = self.options
        whole = torch.full((3, H, 6, longest), -torch.inf, dtype=torch.float64)
        for n in range(3):
            own_q, own_k = q[self.starts[n] : self.starts[n + 1]], k[starts_k[n] : starts_k[n + 1]]
            u = stand_in.dense_logits(
                own_q,
                own_k,
                None,
                o.get("causal", False),
                o.get("window_size", (-1, -1)),
                0.0,
                o.get("alibi_slopes"),
            )
            whole[n, :, : len(own_q), : len(own_k)] = u
        return whole


@pytest.mark.parametrize("packing", ["", "kv", "qkv"])
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"causal": True, "window_size": (2, 0), "alibi_slopes": SLOPES}],
    ids=str,
)
def test_sequences_one_after_the_other(packing: str, options: dict[str, Any]) -> None:
    model, x = Varlen(packing, **options), torch.randn(1, 13, H * D)
    table = check_model(model, (x,), model.logits(x))
    assert table["floor_weights"].isna().all()
    assert (table["floor_activation"] <= table["floor_row"] + 1e-4).all()
    if not packing:  # a copy of two projections together comes from neither
        check(table, {"sigma_qk": model.sigma_qk()})


def test_half_precision() -> None:
    model, x = Flash(causal=True).bfloat16(), torch.randn(B, T, H * D).bfloat16()
    check(
        em.measure(model, x, rows="all"),
        {k: v for k, v in figures(model.logits(x)).items() if k != "max_logit"},
        1e-3,
    )


def test_training_step_is_the_same_and_counted_once() -> None:
    model = nn.Sequential(Flash(causal=True), Flash(causal=True))
    x = torch.randn(B, T, H * D)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(x).square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    with em.capture(model, rows="all") as seen:
        watched = gradients()
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert list(seen.heads["layer"]) == ["0"] * H + ["1"] * H
    assert set(seen.heads["call"]) == {0}


def test_a_function_that_fails_leaves_watching_as_it_was() -> None:
    class Fails(Flash):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x)
            with pytest.raises(RuntimeError):
                stand_in.flash_attn_func(q, k, v[:, 1:])
            return super().forward(x)

    model, x = Fails(), torch.randn(B, T, H * D)
    code = stand_in.flash_attn_func.__code__
    table = em.measure(model, x, rows="all")
    check(table[table["call"] == table["call"].max()], figures(model.logits(x)))
    assert stand_in.flash_attn_func.__code__ is code


def test_paged_keys_are_told_to_be_unread() -> None:
    class Paged(Flash):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (y[0] for y in self.qkv(x))
            starts = torch.tensor([0, T], dtype=torch.int32)
            return stand_in.flash_attn_varlen_func(q, k, v, starts, starts, T, T, block_table=starts)

    with pytest.raises(em.AttentionNotFoundError, match="block_table"):
        em.measure(Paged(), torch.randn(1, T, H * D))


def test_one_projection_for_all_three() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(H * D, 3 * H * D)

        def forward(self, x: Tensor) -> Tensor:
            return stand_in.flash_attn_qkvpacked_func(self.qkv(x).unflatten(-1, (3, H, D)), causal=True)

    model, x = Fused(), torch.randn(B, T, H * D)
    w = model.qkv.weight.detach().double().view(3, H, D, H * D)
    want = torch.linalg.matrix_norm(w[1].transpose(1, 2) @ w[0], 2)
    table = em.measure(model, x)
    check(table, {"sigma_qk": want})
    assert table["floor_weights"].notna().all()
