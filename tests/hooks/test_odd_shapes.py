"""Attention of shapes that are not `[batch, heads, tokens, head size]`, against a dense float64 account."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

import entropy_monitor as em
from tests.zoo.dense import Dense, figures, heads_of

WIDTH, HEADS, HEAD = 32, 4, 8
TOLERANCE = 2e-5
OF_ROWS = ("rows_read", "entropy", "max_entropy", "max_logit", "floor_row", "floor_activation")
OF_WEIGHTS = ("sigma_q", "sigma_k", "sigma_qk")


def inputs(batch: int, tokens: int) -> Tensor:
    return 2 * torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(1))


def assert_figures(table: Any, dense: Dense, columns: Sequence[str] = OF_ROWS) -> None:
    """These columns are those of the account."""
    expected = figures(dense)
    assert len(table) == dense.logits.shape[1]
    for column in columns:
        want, got = expected[column], torch.tensor(table[column].to_numpy(), dtype=torch.float64)
        assert want is not None
        room = TOLERANCE * want.abs().max().clamp(min=1)
        assert ((got - want).abs() <= room).all(), f"{column}: {got}, want {want}"


def assert_right_or_null(table: Any, dense: Dense) -> None:
    """No spectral norm is told that is not the one of the weights."""
    expected = figures(dense)
    for column in OF_WEIGHTS:
        got, want = torch.tensor(table[column].to_numpy(), dtype=torch.float64), expected[column]
        null = torch.full_like(got, math.nan) if want is None else want
        assert got.isnan().all() or torch.allclose(got, null, rtol=1e-5), f"{column}: {got}, want {null}"


# Five dimensions


class MaskUnits(nn.Module):
    """As Hiera calls SDPA: `[B, heads, windows, T, D]`, where tokens of a window lie `windows` apart.

    Args:
        windows: of every sequence.
        stride: of the queries' max-pooling.
        copied: what of "qk" is scaled, so that its memory no longer tells what is what.
    """

    def __init__(self, windows: int, stride: int = 1, copied: str = "") -> None:
        super().__init__()
        self.heads, self.windows, self.stride, self.copied = HEADS, windows, stride, copied
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = self.qkv(x).reshape(x.shape[0], -1, self.windows, 3, HEADS, HEAD)
        q, k, v = parts.permute(3, 0, 4, 2, 1, 5)
        if self.stride > 1:
            q = q.unflatten(3, (self.stride, -1)).amax(dim=3)
        return (q * 1.5 if "q" in self.copied else q), (k * 1.5 if "k" in self.copied else k), v

    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(*self.split(x))
        return self.proj(y.transpose(1, 3).flatten(3).flatten(1, 2))


def mask_units(windows: int, stride: int = 1, copied: str = "") -> tuple[MaskUnits, Tensor, Dense]:
    torch.manual_seed(0)
    model, x = MaskUnits(windows, stride, copied), inputs(3, 6 * windows)
    q, k, _ = (y.detach().double().transpose(1, 2).flatten(0, 1) for y in model.split(x))
    logits = q @ k.mT / math.sqrt(HEAD)
    w_q, w_k, _ = (heads_of(w, HEADS) for w in model.qkv.weight.split(WIDTH))
    linear = stride == 1
    return model, x, Dense("MaskUnits", logits, w_q if linear else None, w_k, q, k, HEAD**-0.5)


@pytest.mark.parametrize(
    ("windows", "stride", "copied"),
    [
        (3, 1, ""),
        (HEADS, 1, ""),
        (2, 1, ""),
        (2 * HEADS, 1, ""),
        (3, 1, "q"),
        (2 * HEADS, 1, "qk"),
        (HEADS, 1, "q"),
        (3, 2, ""),
        (HEADS, 2, ""),
    ],
)
def test_windows_between_heads_and_tokens(windows: int, stride: int, copied: str) -> None:
    model, x, dense = mask_units(windows, stride, copied)
    table = em.measure(model, x)
    assert_figures(table, dense)
    assert table["floor_weights"].isna().all()


def test_windows_that_nothing_tells_from_heads_are_not_guessed() -> None:
    model, x, _ = mask_units(HEADS, copied="qk")
    with pytest.raises(em.AttentionNotFoundError, match=rf"shape \[3, {HEADS}, {HEADS}, 6, {HEAD}\] hold"):
        em.measure(model, x)


def test_windows_first_are_told_from_heads_by_values() -> None:
    """`[B, windows, heads, T, D]`, copied: rows in the order in which the projection made them."""
    torch.manual_seed(0)

    class WindowsFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = HEADS
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

        def split(self, y: Tensor) -> tuple[Tensor, ...]:
            parts = self.qkv(y.unflatten(1, (HEADS, 6))).unflatten(-1, (3, HEADS, HEAD))
            q, k, v = parts.permute(3, 0, 1, 4, 2, 5)
            return q * 1.5, k * 1.5, v

        def forward(self, y: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(*self.split(y))

    model, x = WindowsFirst(), inputs(3, 6 * HEADS)
    q, k, _ = (y.detach().double().flatten(0, 1) for y in model.split(x))
    assert_figures(em.measure(model, x), Dense("", q @ k.mT / math.sqrt(HEAD), None, None, q, k, HEAD**-0.5))


@pytest.mark.parametrize(("windows", "stride"), [(3, 1), (HEADS, 1), (3, 2)])
def test_weights_behind_windows_are_right_or_null(windows: int, stride: int) -> None:
    model, x, dense = mask_units(windows, stride)
    assert_right_or_null(em.measure(model, x), dense)


def test_a_mask_of_windows() -> None:
    """A mask of five dimensions is laid out as the queries are."""
    model, x, dense = mask_units(3)
    visible = torch.rand(3, 1, 3, 6, 6, generator=torch.Generator().manual_seed(2)) < 0.6
    visible |= torch.eye(6, dtype=torch.bool)

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, y: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(*self.inner.split(y), attn_mask=visible)

    hidden = ~visible.expand(3, HEADS, 3, 6, 6).transpose(1, 2).flatten(0, 1)
    dense.logits = dense.logits.masked_fill(hidden, -math.inf)
    assert_figures(em.measure(Masked(), x), dense)


# Channels that attend to channels


class CrossCovariance(nn.Module):
    """XCA: maps of `[D, D]`, over the features of each head; tokens are what products run over.

    Args:
        declared: the attribute that tells the number of heads.
        fused: by SDPA.
        normed: normalise over tokens, as XCiT does: copies, whose memory tells nothing.
    """

    def __init__(self, declared: str = "num_heads", fused: bool = False, normed: bool = True) -> None:
        super().__init__()
        setattr(self, declared, HEADS)
        self.fused, self.normed = fused, normed
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.temperature = nn.Parameter(torch.linspace(0.5, 3.0, HEADS).view(HEADS, 1, 1))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD)).permute(2, 0, 3, 4, 1)
        return (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v) if self.normed else (q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        if self.fused:
            y = F.scaled_dot_product_attention(q * self.temperature, k, v, scale=1.0)
        else:
            y = (q @ k.transpose(-2, -1) * self.temperature).softmax(-1) @ v
        return self.proj(y.permute(0, 3, 1, 2).flatten(2))


def cross_covariance(batch: int, tokens: int, **options: Any) -> tuple[CrossCovariance, Tensor, Dense]:
    torch.manual_seed(0)
    model, x = CrossCovariance(**options), inputs(batch, tokens)
    q, k, _ = (y.detach().double() for y in model.split(x))
    scale = model.temperature.detach().double()
    return model, x, Dense("XCA", scale * (q @ k.mT), None, None, q, k, scale.flatten())


# Of 32 features, so many tokens look like a head's size: 2 heads, 8, or none.
LIKE_HEADS = [(2, 16), (8, 4), (3, 7), (4, HEAD)]


@pytest.mark.parametrize("declared", ["num_heads", "heads", "n_heads"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("batch", "tokens"), LIKE_HEADS)
def test_attention_over_features_with_declared_heads(
    batch: int, tokens: int, fused: bool, declared: str
) -> None:
    model, x, dense = cross_covariance(batch, tokens, declared=declared, fused=fused)
    table = em.measure(model, x)
    assert_figures(table, dense)
    assert table["rows_read"].tolist() == [batch * HEAD] * HEADS  # features, not tokens
    assert torch.tensor(table["max_entropy"]).sub(math.log(HEAD)).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("batch", "tokens", "normed"),
    [
        (2, 16, True),
        (3, 7, True),
        (2, 16, False),
        (2, HEAD, True),
        (2, HEAD, False),
        (3, WIDTH, True),
    ],
)
def test_no_projection_is_told_of_attention_over_features(batch: int, tokens: int, normed: bool) -> None:
    """`W_K W_Qᵀ` bounds products over features; these run over tokens."""
    model, x, _ = cross_covariance(batch, tokens, normed=normed)
    table = em.measure(model, x)
    assert table[[*OF_WEIGHTS, "floor_paper", "floor_weights"]].isna().all().all()


# Heads folded into the batch, with a class token


class Folded(nn.Module):
    """`(b h) n d`, as einops users write it.

    Args:
        token: where the class token joins: before the projections, only keys and values, or after them.
        normed: normalise queries.
    """

    def __init__(self, token: str, normed: bool = False) -> None:
        super().__init__()
        self.heads, self.token, self.normed = HEADS, token, normed
        self.to_qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.to_out = nn.Linear(WIDTH, WIDTH)
        self.tokens = nn.Parameter(torch.randn(3, WIDTH))

    def split(self, x: Tensor) -> list[Tensor]:
        ours = repeat(self.tokens, "r d -> r b 1 d", b=x.shape[0])
        if self.token == "before":
            x = torch.cat([ours[0], x], dim=1)
        parts = self.to_qkv(x).chunk(3, dim=-1)
        if self.token != "before":
            joined = (self.token == "after", True, True)
            parts = [
                torch.cat([t, p], dim=1) if j else p for t, p, j in zip(ours, parts, joined, strict=True)
            ]
        q, k, v = (rearrange(p, "b n (h d) -> (b h) n d", h=HEADS) for p in parts)
        return [F.rms_norm(q, (HEAD,)) if self.normed else q, k, v]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        maps = (torch.einsum("b i d, b j d -> b i j", q, k) * HEAD**-0.5).softmax(dim=-1)
        y = torch.einsum("b i j, b j d -> b i d", maps, v)
        return self.to_out(rearrange(y, "(b h) n d -> b n (h d)", h=HEADS))


def folded(batch: int, token: str, normed: bool) -> tuple[Folded, Tensor, Dense]:
    torch.manual_seed(0)
    model, x = Folded(token, normed), inputs(batch, 6)
    q, k, _ = (rearrange(y.detach().double(), "(b h) n d -> b h n d", h=HEADS) for y in model.split(x))
    w_q, w_k, _ = (heads_of(w, HEADS) for w in model.to_qkv.weight.split(WIDTH))
    return model, x, Dense("Folded", q @ k.mT * HEAD**-0.5, w_q, w_k, q, k, HEAD**-0.5)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("batch", [3, HEADS, 2 * HEADS])
@pytest.mark.parametrize("token", ["before", "keys"])
def test_heads_folded_into_the_batch_beside_a_class_token(token: str, batch: int, normed: bool) -> None:
    model, x, dense = folded(batch, token, normed)
    table = em.measure(model, x)
    assert_figures(table, dense, (*OF_ROWS, *OF_WEIGHTS))
    assert table["floor_weights"].isna().all() == (normed or token == "keys")


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("batch", [3, HEADS, 2 * HEADS])
def test_a_class_token_among_folded_queries_is_not_guessed(batch: int, normed: bool) -> None:
    """The queries have more rows than their projection: in which order heads lie, nothing tells.

    Without that word each head of each sequence would pass for a sequence of one head.
    """
    model, x, _ = folded(batch, "after", normed)
    shape = (
        rf"shape \[{batch * HEADS}, 7, {HEAD}\] hold {HEADS} heads .* Keep heads in a dimension of their own"
    )
    with pytest.raises(em.AttentionNotFoundError, match=shape):
        em.measure(model, x)
