from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import entropy_monitor as em
from entropy_monitor.errors import ConfigurationError
from entropy_monitor.measures import row_statistics_from_weights
from entropy_monitor.remedies.scale_invariance.attention import scale_invariant_attention
from tests.hooks.sources.reference import B, D, H, K, Projected, T, check, check_model, figures

SEEN = torch.ones(T, T).tril().bool()
LOWEST = torch.finfo(torch.float32).min
# Of two sequences the second has three keys less; 3 queries see nothing where that is asked for.
PADDING = torch.arange(T) < torch.tensor([T, T - 3])[:, None, None, None]
ALMOST = SEEN & (torch.arange(T)[:, None] >= 3)


def oracle(scores: Tensor, visible: Tensor | None = None) -> Tensor:
    """Row by row, number by number, float64."""
    visible = torch.ones_like(scores, dtype=torch.bool) if visible is None else visible.expand(scores.shape)
    out = torch.zeros(scores.shape, dtype=torch.float64)
    for row in itertools.product(*map(range, scores.shape[:-1])):
        keys = [j for j in range(scores.shape[-1]) if visible[row][j]]
        positive = {j: max(float(scores[row][j]), 0.0) for j in keys}
        total = sum(positive.values())
        for j in keys:
            out[row][j] = positive[j] / total if total > 0 else 1 / len(keys)
    return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_values(dtype: torch.dtype) -> None:
    scores = (torch.randn(2, 3, 7, 9) - 1.2).to(dtype)
    assert (scores <= 0).all(-1).any()
    got = scale_invariant_attention(scores)
    assert got.dtype == dtype
    tolerance = {"rtol": 1e-14, "atol": 0.0} if dtype == torch.float64 else {}
    torch.testing.assert_close(got, oracle(scores).to(dtype), **tolerance)


def test_sums_of_low_precision_are_taken_in_float32() -> None:
    scores = torch.ones(1, 70_000, dtype=torch.float16)  # their sum is no float16
    got = scale_invariant_attention(scores, dtype=torch.float32)
    torch.testing.assert_close(got, torch.full((1, 70_000), 1 / 70_000))
    assert scale_invariant_attention(scores).isfinite().all()


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
def test_it_is_called_as_softmax_is(dim: int) -> None:
    scores = torch.randn(3, 4, 5)
    scores[0, :, 0] = scores[:, 0, 1] = -1.0
    got = scale_invariant_attention(scores, dim=dim, dtype=torch.float64)
    assert got.shape == F.softmax(scores, dim=dim, dtype=torch.float64).shape
    assert got.dtype == torch.float64
    torch.testing.assert_close(got.movedim(dim, -1), oracle(scores.movedim(dim, -1)))
    assert scale_invariant_attention(torch.tensor(-2.0), 0) == 1
    assert scale_invariant_attention(torch.empty(2, 0, 3), -1).shape == (2, 0, 3)
    assert scale_invariant_attention(torch.empty(2, 0)).shape == (2, 0)
    integers = torch.tensor([[2, -1, 2]])
    assert scale_invariant_attention(integers, -1, torch.float32).tolist() == [[0.5, 0.0, 0.5]]
    with pytest.raises(IndexError):
        scale_invariant_attention(scores, 3)


def test_it_is_exactly_0_homogeneous() -> None:
    scores = torch.randn(64, 17, dtype=torch.float64) - 1
    assert (scores <= 0).all(-1).any()
    base = scale_invariant_attention(scores)
    for power in (-60, -1, 1, 20):
        assert torch.equal(scale_invariant_attention(scores * 2.0**power), base)
    for scale in (1e-30, 0.3, 7e6):
        torch.testing.assert_close(scale_invariant_attention(scores * scale), base, rtol=1e-14, atol=0.0)


def added(value: float, scores: Tensor, seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape, dtype=scores.dtype).masked_fill(~seen, value)


MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "-inf": lambda u, seen: u.masked_fill(~seen, -math.inf),
    "-1e9 filled": lambda u, seen: u.masked_fill(~seen, -1e9),
    "-1e9 added": lambda u, seen: u + added(-1e9, u, seen),
    "lowest": lambda u, seen: u.masked_fill(~seen, torch.finfo(u.dtype).min),
    "lowest added": lambda u, seen: u + added(torch.finfo(u.dtype).min, u, seen),
    "half of the lowest": lambda u, seen: u.masked_fill(~seen, torch.finfo(u.dtype).min / 2),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_hidden_keys_get_nothing_also_where_no_score_is_positive(mask: str, dtype: torch.dtype) -> None:
    scores = (torch.randn(B, H, T, T) - 1.5).to(dtype)
    hidden = MASKS[mask](scores, SEEN)
    got = scale_invariant_attention(hidden)
    assert not got[..., ~SEEN].any()
    assert got.dtype == dtype
    torch.testing.assert_close(got, oracle(scores, SEEN).to(dtype))


def test_float16_masks() -> None:
    scores = (torch.randn(B, H, T, T) - 1.5).half()
    for fill in (-math.inf, torch.finfo(torch.float16).min, -6e4):
        got = scale_invariant_attention(scores.masked_fill(~SEEN, fill), dtype=torch.float32)
        torch.testing.assert_close(got, oracle(scores, SEEN).float())


@pytest.mark.parametrize("fill", [-math.inf, -1e9, LOWEST])
def test_a_row_that_sees_nothing_is_zero_and_has_no_gradient(fill: float) -> None:
    scores = torch.ones(2, 5, requires_grad=True)
    got = scale_invariant_attention(scores.masked_fill(torch.tensor([[True], [False]]), fill))
    assert got[0].tolist() == [0.0] * 5
    got[:, 0].sum().backward()
    assert scores.grad[0].tolist() == [0.0] * 5
    assert scores.grad.isfinite().all()
    assert scores.grad[1].any()


def test_a_row_without_a_positive_score_is_uniform_and_has_no_gradient() -> None:
    scores = torch.tensor([[-1.0, 0.0, -3.0, -math.inf], [1.0, 3.0, -1.0, 0.0]], requires_grad=True)
    got = scale_invariant_attention(scores)
    torch.testing.assert_close(got, torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0.0], [0.25, 0.75, 0.0, 0.0]]))
    got[:, 0].sum().backward()
    torch.testing.assert_close(scores.grad, torch.tensor([[0.0] * 4, [3 / 16, -1 / 16, 0.0, 0.0]]))


def test_nan_stays_in_its_row() -> None:
    scores = torch.tensor([[1.0, math.nan], [1.0, 1.0]])
    assert scale_invariant_attention(scores).isnan().tolist() == [[True, True], [False, False]]


def test_derivatives() -> None:
    scores = torch.randn(4, 6, dtype=torch.float64)
    scores[1] = -scores[1].abs()  # no positive score
    scores[2, 3:] = -math.inf
    visible = scores > -math.inf
    free = scores[visible].requires_grad_()

    def function(x: Tensor) -> Tensor:
        return scale_invariant_attention(torch.full_like(scores, -math.inf).masked_scatter(visible, x))

    assert torch.autograd.gradcheck(function, free)
    assert torch.autograd.gradgradcheck(function, free)
    # Euler: the gradient of what is 0-homogeneous is orthogonal to the scores.
    x = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    (scale_invariant_attention(x) * torch.randn(5, 9)).sum().backward()
    assert (x * x.grad).sum(-1).abs().max() < 1e-14
    batched = torch.func.vmap(scale_invariant_attention)(x)
    assert torch.equal(batched, scale_invariant_attention(x))


def test_it_compiles_without_a_break() -> None:
    scores = torch.randn(2, 3, 8, 8).masked_fill(~torch.ones(8, 8).tril().bool(), -math.inf)
    compiled = torch.compile(scale_invariant_attention, fullgraph=True, backend="aot_eager")
    for dtype in (torch.float32, torch.bfloat16):
        x, y = (scores.to(dtype).clone().requires_grad_() for _ in range(2))
        got, want = compiled(x), scale_invariant_attention(y)
        assert torch.equal(got, want)
        got[..., 0].sum().backward()
        want[..., 0].sum().backward()
        assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", ["largest", "smallest"])
def test_scores_at_the_ends_of_a_dtypes_range(dtype: torch.dtype, size: str) -> None:
    info = torch.finfo(dtype)
    top = info.max if size == "largest" else info.smallest_normal * 4
    x = torch.tensor([[1.0, 1.0, 0.5, -1.0], [1.0, 0.25, 0.0, -0.5]], dtype=dtype).mul(top)
    want = torch.tensor([[0.4, 0.4, 0.2, 0.0], [0.8, 0.2, 0.0, 0.0]]).to(dtype)
    torch.testing.assert_close(scale_invariant_attention(x), want)


def test_the_gradient_of_large_scores() -> None:
    x = torch.tensor([2.0**127, 2.0**127], requires_grad=True)  # their sum is no float32
    got = scale_invariant_attention(x)
    assert got.tolist() == [0.5, 0.5]
    got[0].mul(2.0**30).backward()
    assert x.grad.tolist() == [2.0**-99, -(2.0**-99)]


def test_an_infinite_score_is_as_in_a_softmax() -> None:
    scores = torch.tensor([[1.0, math.inf], [1.0, 1.0]])
    assert torch.equal(scale_invariant_attention(scores).isnan(), scores.softmax(-1).isnan())


@pytest.mark.parametrize(("fill", "hides"), [(-1e4, False), (-9.8e8, False), (-1e9, True), (-math.inf, True)])
def test_which_finite_mask_values_hide(fill: float, hides: bool) -> None:
    got = scale_invariant_attention(torch.tensor([[-1.0, fill], [1.0, fill]]))
    assert got.tolist() == [[1.0, 0.0] if hides else [0.5, 0.5], [1.0, 0.0]]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (3, "scores must be a tensor of real numbers, got int"),
        ([[1.0]], "got list"),
        (torch.ones(2, dtype=torch.complex64), "got a tensor of torch.complex64"),
        (torch.ones(2, dtype=torch.bool), "got a tensor of torch.bool"),
    ],
)
def test_other_things_are_refused(scores: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        scale_invariant_attention(scores, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [None, torch.int32])
def test_integers_are_refused(dtype: torch.dtype | None) -> None:
    with pytest.raises(
        ConfigurationError, match=r"must be floating, got torch\.int64.*pass dtype=torch\.float32"
    ):
        scale_invariant_attention(torch.ones(2, 2, dtype=torch.int64), dtype=dtype)


class Hand(Projected):
    """Hand-written attention; `mask` is applied to the scores; some rows have none above 0."""

    def __init__(self, mask: Callable[[Tensor], Tensor], key_heads: int = H, cast: bool = False) -> None:
        super().__init__(key_heads)
        self.mask, self.drop, self.cast = mask, nn.Dropout(0.3), cast

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in self.qkv(x))
        k, v = (y.repeat_interleave(H // y.shape[1], dim=1) for y in (k, v))
        u = self.mask(q @ k.transpose(-2, -1) * D**-0.5 - 1.5)
        p = scale_invariant_attention(u, dim=-1, dtype=torch.float32 if self.cast else None).to(v.dtype)
        return self.out((self.drop(p) @ v).transpose(1, 2).flatten(2))


CASES: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "all seen": (lambda u: u, torch.ones(T, T).bool()),
    "causal": (lambda u: u.masked_fill(~SEEN, -math.inf), SEEN),
    "causal, lowest": (lambda u: u.masked_fill(~SEEN, LOWEST), SEEN),
    "padding, -1e9 added": (lambda u: u + torch.where(PADDING, 0.0, -1e9), PADDING),
    "rows that see nothing": (lambda u: u.masked_fill(~ALMOST, -math.inf), ALMOST),
}


def wanted(model: Hand, x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Scores, -inf where hidden, and maps of every row."""
    scores = model.products(x) - 1.5
    maps = oracle(scores, seen)
    assert ((scores <= 0) | ~seen).all(-1).any()
    return scores.masked_fill(~seen, -math.inf), maps


@pytest.mark.parametrize("key_heads", [H, K], ids=["heads alike", "grouped"])
@pytest.mark.parametrize("case", CASES)
def test_it_is_measured(case: str, key_heads: int) -> None:
    mask, seen = CASES[case]
    model, x = Hand(mask, key_heads).eval(), torch.randn(B, T, H * D)
    table = check_model(model, (x,), *wanted(model, x, seen), "relu")
    check(table, {"sigma_qk": model.sigma_qk()})
    floors = table[["floor_row", "floor_activation", "floor_weights", "floor_paper"]]
    assert floors.isna().all().all()


@pytest.mark.parametrize(
    ("backend", "case"),
    [
        ("aot_eager", "all seen"),
        ("aot_eager", "padding, -1e9 added"),
        ("aot_eager", "rows that see nothing"),
        ("inductor", "causal"),
    ],
)
def test_it_is_measured_in_compiled_code(case: str, backend: str) -> None:
    torch.compiler.reset()
    mask, seen = CASES[case]
    model, x = Hand(mask).eval(), torch.randn(B, T, H * D)
    compiled: Any = torch.compile(model, fullgraph=True, backend=backend)
    compiled(x)
    with em.capture(compiled, rows="all") as found:
        compiled(x)
    assert set(found.heads["attention"]) == {"relu"}
    check(found.heads, figures(*wanted(model, x, seen)))


def test_it_is_measured_before_dropout_and_under_a_cast() -> None:
    model, x = Hand(lambda u: u, cast=True).train(), torch.randn(B, T, H * D)
    table = em.measure(model, x, rows="all")
    check(table, figures(*wanted(model, x, CASES["all seen"][1])))


def test_it_is_measured_in_low_precision() -> None:
    scores: list[Tensor] = []

    def mask(u: Tensor) -> Tensor:
        scores.append(u.detach().masked_fill(~SEEN, -math.inf))
        return scores[-1]

    model, x = Hand(mask).eval(), torch.randn(B, T, H * D)
    with torch.autocast("cpu", torch.bfloat16):
        table = em.measure(model, x, rows="all")
    assert scores[-1].dtype == torch.bfloat16
    assert set(table["attention"]) == {"relu"}
    want = figures(scores[-1], oracle(scores[-1], SEEN))
    check(table, {name: want[name] for name in ("max_entropy", "max_logit", "rows_read")})
    check(table, {"entropy": want["entropy"]}, 1e-2)  # of weights that were rounded to bfloat16


def test_a_mask_of_float16_is_told_from_scores_under_a_cast() -> None:
    def mask(u: Tensor) -> Tensor:
        return u.half().masked_fill(~SEEN, torch.finfo(torch.float16).min)

    model, x = Hand(mask, cast=True).eval(), torch.randn(B, T, H * D)
    table = em.measure(model, x, rows="all")
    scores = (model.products(x) - 1.5).half().masked_fill(~SEEN, -math.inf)
    check(table, figures(scores, oracle(scores, SEEN)), 1e-2)
    check(table, {"max_entropy": figures(scores)["max_entropy"]})


def test_training_is_watched_and_unchanged(tmp_path: Path) -> None:
    def train(watch: bool) -> tuple[list[Tensor], Any]:
        torch.manual_seed(0)
        model = Hand(CASES["causal"][0]).train()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        monitor = None
        if watch:
            monitor = em.EntropyMonitor(
                model, optimizer=optimizer, run_dir=tmp_path / "run", every=2, rows="all"
            )
        for _ in range(4):
            loss = model(torch.randn(B, T, H * D)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if monitor is not None:
                monitor.step(loss)
        if monitor is not None:
            monitor.close()
        return [p.detach().clone() for p in model.parameters()], monitor

    plain, _ = train(False)
    watched, _ = train(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    heads = em.load_run(tmp_path / "run").heads
    assert sorted(heads["step"].unique()) == [0, 2]
    assert set(heads["attention"]) == {"relu"}
    torch.manual_seed(0)
    model = Hand(CASES["causal"][0])
    want = figures(*wanted(model, torch.randn(B, T, H * D), SEEN))
    check(heads[heads["step"] == 0], want)


def test_what_is_measured_is_the_entropy_of_what_it_returns() -> None:
    scores = torch.randn(B, H, T, T, dtype=torch.float64) - 1.5
    weights = scale_invariant_attention(scores)
    stats = row_statistics_from_weights(weights, scores)
    uniform = (scores <= 0).all(-1)
    assert uniform.any()
    torch.testing.assert_close(stats.entropy, torch.special.entr(oracle(scores)).sum(-1))
    assert (stats.num_keys == T).all()
    torch.testing.assert_close(stats.entropy[uniform], torch.full_like(stats.entropy[uniform], math.log(T)))
