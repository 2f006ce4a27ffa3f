"""Projections that users name themselves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import entropy_monitor as em

B, T, H, K, HD, D = 2, 9, 4, 2, 8, 20


class Odd(nn.Module):
    """Heads made in a way that no tracing follows: a table of weights, mixed by a learned matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(H, D, HD))
        self.mix = nn.Parameter(torch.randn(H, H))
        self.keys = nn.Linear(D, K * HD)

    def weights(self) -> Tensor:
        return torch.tensordot(self.mix, self.table, 1)

    def forward(self, x: Tensor) -> Tensor:
        q = torch.stack([(x.unsqueeze(-1) * w).sum(-2) for w in self.weights()], 1)
        k = self.keys(x).unflatten(-1, (K, HD)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, k, enable_gqa=True)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Odd() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self.layers])


def told(module: nn.Module) -> em.Projections:
    assert isinstance(module, Odd)
    key, bias = module.keys.weight.view(K, HD, D).mT, module.keys.bias.view(K, HD)
    return em.Projections(query=module.weights(), key=key, key_bias=bias)


def model() -> tuple[Model, Tensor]:
    torch.manual_seed(0)
    return Model(), torch.randn(B, T, D)


def expect(table: object, layer: str, module: Odd) -> None:
    rows = table[table.layer == layer]  # type: ignore[index]
    wq = module.weights().detach().double()
    wk = module.keys.weight.detach().double().view(K, HD, D).mT.repeat_interleave(H // K, 0)
    for name, want in (("sigma_q", wq), ("sigma_k", wk), ("sigma_qk", wk @ wq.mT)):
        assert rows[name].tolist() == pytest.approx(torch.linalg.matrix_norm(want, 2).tolist(), rel=1e-5), (
            name
        )


@pytest.mark.parametrize("owner", [Odd, "layers.*"])
@pytest.mark.parametrize("compiled", [False, True])
def test_what_was_registered_is_used(owner: type[nn.Module] | str, compiled: bool) -> None:
    net, x = model()
    run = torch.compile(net, backend="eager") if compiled else net
    with em.register_projections(owner, told), em.capture(net) as seen, torch.no_grad():
        run(x)
    for i in range(2):
        expect(seen.heads, f"layers.{i}", net.layers[i])


def test_it_can_be_undone_and_the_latest_counts() -> None:
    net, x = model()
    first = em.register_projections(Odd, lambda _: pytest.fail("a later one comes first"))
    second = em.register_projections("layers.0", told)
    third = em.register_projections("layers.1", told)
    em.measure(net, x)
    third.remove()
    fourth = em.register_projections("layers.1", lambda _: None)  # leaves it to the first
    with pytest.raises(BaseException, match="a later one comes first"):
        em.measure(net, x)
    for registration in (first, second, third, fourth):
        registration.remove()
    assert em.measure(net, x)[["sigma_q", "sigma_qk"]].isna().all(axis=None)


def test_a_wrong_key_is_found_out() -> None:
    """The keys' input is known, for a linear layer made them: so what is registered for them is checked."""

    def wrong(module: nn.Module) -> em.Projections:
        right = told(module)
        return em.Projections(right.query, right.key.flip(0), key_bias=right.key_bias)

    net, x = model()
    with em.register_projections(Odd, wrong):
        table = em.measure(net, x)
    assert table[["sigma_k", "sigma_qk"]].isna().all(axis=None)
    assert table.sigma_q.notna().all()


@pytest.mark.parametrize("heads", [H // 2, 3])
def test_other_numbers_of_heads_are_unknown(heads: int) -> None:
    net, x = model()
    with em.register_projections(
        Odd, lambda _: em.Projections(torch.randn(heads, D, HD), torch.randn(1, D, HD))
    ):
        table = em.measure(net, x)
    assert table.sigma_qk.isna().all()


def test_of_torchs_own_attention() -> None:
    """It wins over what the call itself says, and is checked against that call's input."""
    torch.manual_seed(0)
    mha, x = nn.MultiheadAttention(16, 4, batch_first=True), torch.randn(2, 5, 16)
    right = em.measure(mha, x, x, x)

    def halves(module: nn.Module) -> em.Projections:
        q, k, _ = module.in_proj_weight.view(3, 4, 4, 16).mT  # type: ignore[operator]
        bq, bk, _ = module.in_proj_bias.view(3, 4, 4)  # type: ignore[operator]
        return em.Projections(q, k, bq, bk)

    with em.register_projections(nn.MultiheadAttention, halves):
        same = em.measure(mha, x, x, x)
    assert same.sigma_qk.tolist() == pytest.approx(right.sigma_qk.tolist(), rel=1e-6)
    with em.register_projections(nn.MultiheadAttention, lambda m: em.Projections(*[halves(m).key] * 2)):
        other = em.measure(mha, x, x, x)
    assert other.sigma_qk.isna().all()


W = torch.zeros(4, 16, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: em.Projections(W[0], W),
            r"query must be .* \[heads, d_model, d_head\], got float32 of shape",
        ),
        (lambda: em.Projections(W, W.long()), "key must be a floating-point tensor"),
        (lambda: em.Projections(W, None), "key must be a floating-point tensor .*, got NoneType"),
        (lambda: em.Projections(W, W[:3]), "must divide that of query heads, got 3 and 4"),
        (lambda: em.Projections(W, W[:0]), "must divide that of query heads, got 0 and 4"),
        (lambda: em.Projections(W, W[..., :4]), "the same d_head, got 8 and 4"),
        (
            lambda: em.Projections(W, W, W[0]),
            r"query_bias must be a tensor \[heads, d_head\] = \[4, 8\], got",
        ),
        (lambda: em.Projections(W, W[:2], None, W[:, 0]), r"key_bias must be .* = \[2, 8\], got"),
        (
            lambda: em.register_projections(3, told),
            "owner must be a class of modules or a name pattern, got 3",
        ),
        (lambda: em.register_projections("", told), "owner must be a class"),
        (lambda: em.register_projections(int, told), "owner must be a class"),
        (
            lambda: em.register_projections(Odd, 4),
            "function must take a module and return em.Projections, got 4",
        ),
    ],
)
def test_bad_arguments(make: Callable[[], object], message: str) -> None:
    with pytest.raises(em.ConfigurationError, match=message):
        make()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m: m.nothing, "registered for the projections of layers.0 failed: AttributeError"),
        (lambda m: (W, W), "must return em.Projections or None, got tuple"),
        (lambda m: em.Projections(W, W[:3]), "must divide"),
    ],
)
def test_a_function_that_fails_is_told(
    function: Callable[[nn.Module], em.Projections], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    net, x = model()
    with em.register_projections(Odd, function):
        table = em.measure(net, x)
        with em.capture(net) as seen:
            net(x)
    assert seen.faults == {"projections of layers.0": 1, "projections of layers.1": 1}
    assert message in caplog.text
    assert table[["sigma_q", "sigma_k", "sigma_qk"]].isna().all(axis=None)
    assert table.entropy.tolist() == em.measure(net, x).entropy.tolist()
    assert em.measure(net, x).sigma_k.notna().all()
