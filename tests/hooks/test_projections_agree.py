"""Projections are checked against the queries and keys that enter attention: right, or null with a reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from entropy_monitor.guard import Guard
from entropy_monitor.hooks import Recorder, Watcher
from entropy_monitor.hooks.recorder import LayerParts

B, T, H, HD = 2, 13, 4, 8
D = H * HD
Change = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""What is done to queries `[B, H, T, d]`, given the attention and its input `[B, T, D]`."""


class Attention(nn.Module):
    """Attention whose queries are changed after their projection."""

    def __init__(self, change: Change) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, D) for _ in range(3))
        self.gate = nn.Linear(D, D)
        self.token_gate = nn.Linear(D, 1)
        self.gain, self.offset = nn.Parameter(torch.rand(HD) + 0.5), nn.Parameter(torch.randn(HD))
        self.gains, self.offsets = nn.Parameter(torch.rand(D) + 0.5), nn.Parameter(torch.randn(D))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (H, HD)).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        return F.scaled_dot_product_attention(self.change(self, q, x), k, v)


def turned(
    x: Tensor, size: int = HD, adjacent: bool = False, at_end: bool = False, scale: float = 1
) -> Tensor:
    """Rotary embeddings of `size` features."""
    rest, part = (x[..., :-size], x[..., -size:]) if at_end else (x[..., size:], x[..., :size])
    inv = 1.0 / (100 ** (torch.arange(0, size, 2) / size))
    angle = torch.outer(torch.arange(x.shape[2]).float() + 1, inv).to(x.dtype)
    a, b = (part[..., ::2], part[..., 1::2]) if adjacent else part.chunk(2, -1)
    c, s = angle.cos() * scale, angle.sin() * scale
    a, b = a * c - b * s, b * c + a * s
    part = torch.stack((a, b), -1).flatten(-2) if adjacent else torch.cat((a, b), -1)
    return torch.cat((rest, part) if at_end else (part, rest), -1)


def rms(x: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def over_all(norm: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return norm(x.transpose(1, 2).flatten(-2)).unflatten(-1, (H, HD)).transpose(1, 2)


FINE: dict[str, Change] = {
    "plain": lambda m, q, x: q,
    "copied": lambda m, q, x: q.clone(),
    "scaled": lambda m, q, x: q * 0.3,
    "learned vector added": lambda m, q, x: q + m.gains.view(H, 1, HD),
    "scaled by head": lambda m, q, x: q * torch.arange(1.0, H + 1).to(q).view(H, 1, 1),
    "turned": lambda m, q, x: turned(q),
    "turned, adjacent": lambda m, q, x: turned(q, adjacent=True),
    "half turned": lambda m, q, x: turned(q, HD // 2),
    "last half turned": lambda m, q, x: turned(q, HD // 2, at_end=True),
    "half turned and scaled": lambda m, q, x: turned(q, HD // 2, scale=1.3),
    "L2 norm": lambda m, q, x: F.normalize(q, dim=-1),
    "L2 norm, turned": lambda m, q, x: turned(F.normalize(q, dim=-1)),
    "turned, L2 norm": lambda m, q, x: F.normalize(turned(q), dim=-1),
    "RMSNorm": lambda m, q, x: rms(q) * m.gain,
    "RMSNorm, turned": lambda m, q, x: turned(rms(q) * m.gain),
    "RMSNorm, turned, adjacent": lambda m, q, x: turned(rms(q) * m.gain, adjacent=True),
    "RMSNorm, half turned": lambda m, q, x: turned(rms(q) * m.gain, HD // 2),
    "RMSNorm of all heads, turned": lambda m, q, x: turned(over_all(lambda y: rms(y) * m.gains, q)),
    "LayerNorm": lambda m, q, x: F.layer_norm(q, (HD,), m.gain, m.offset),
    "LayerNorm, turned": lambda m, q, x: turned(F.layer_norm(q, (HD,), m.gain, m.offset)),
    "LayerNorm of all heads": lambda m, q, x: over_all(
        lambda y: F.layer_norm(y, (D,), m.gains, m.offsets), q
    ),
    "LayerNorm of all heads, turned": lambda m, q, x: turned(
        over_all(lambda y: F.layer_norm(y, (D,), m.gains, m.offsets), q)
    ),
}
OTHER: dict[str, Change] = {
    "gelu": lambda m, q, x: F.gelu(q),
    "gelu, turned": lambda m, q, x: turned(F.gelu(q)),
    "gelu, RMSNorm, turned": lambda m, q, x: turned(rms(F.gelu(q)) * m.gain),
    "tanh": lambda m, q, x: q.tanh(),
    "softmax": lambda m, q, x: q.sigmoid(),
    "gated": lambda m, q, x: q * torch.sigmoid(m.gate(x)).unflatten(-1, (H, HD)).transpose(1, 2),
    "gated, RMSNorm": lambda m, q, x: rms(
        q * torch.sigmoid(m.gate(x)).unflatten(-1, (H, HD)).transpose(1, 2)
    ),
    "gated by token": lambda m, q, x: q * torch.sigmoid(m.token_gate(x))[:, None],
    "gated by token, turned": lambda m, q, x: turned(q * torch.sigmoid(m.token_gate(x))[:, None]),
    "scaled by feature": lambda m, q, x: q * m.gain,
    "dropped out": lambda m, q, x: F.dropout(q, 0.3),
    "clamped": lambda m, q, x: q.clamp(-0.3, 0.3),
    "squared in place": lambda m, q, x: q.mul_(q),
    "relu in place": lambda m, q, x: q.relu_(),
    "other tokens": lambda m, q, x: q[:, :, torch.randperm(T, generator=torch.Generator().manual_seed(0))],
    "heads mixed": lambda m, q, x: q * 0.5 + q.roll(1, 1),
    "mean of all": lambda m, q, x: q - q.mean((1, 2), keepdim=True),
    "something added": lambda m, q, x: q + x.unflatten(-1, (H, HD)).transpose(1, 2),
}


def parts_of(model: nn.Module, x: Tensor) -> tuple[LayerParts, dict[str, list[float]]]:
    recorder = Recorder("all")
    watcher = Watcher(model, recorder, Guard(strict=True))
    watcher.arm()
    with torch.no_grad():
        model(x)
    watcher.disarm()
    harvest = recorder.harvest()
    from entropy_monitor.hooks import FIGURES

    figures = dict(zip(FIGURES, harvest.figures.tolist(), strict=True))
    (parts,) = recorder.layers.values()
    return parts, figures


def built(change: Change, dtype: torch.dtype = torch.float32) -> tuple[Attention, Tensor]:
    torch.manual_seed(0)
    return Attention(change).to(dtype), torch.randn(B, T, D, dtype=dtype)


def sigmas(linear: nn.Linear) -> list[float]:
    w = linear.weight.detach().double().view(H, HD, D)
    return torch.linalg.matrix_norm(w, 2).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FINE)
def test_rotary_embeddings_and_norms_are_let_pass(name: str, dtype: torch.dtype) -> None:
    model, x = built(FINE[name], dtype)
    parts, figures = parts_of(model, x)
    assert parts.reasons == {}
    assert figures["sigma_q"] == pytest.approx(sigmas(model.q), rel=1e-5)
    assert figures["sigma_k"] == pytest.approx(sigmas(model.k), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OTHER)
def test_what_else_is_done_makes_it_unknown(name: str, dtype: torch.dtype) -> None:
    model, x = built(OTHER[name], dtype)
    parts, figures = parts_of(model, x)
    assert all(v != v for v in figures["sigma_q"] + figures["sigma_qk"])
    assert figures["sigma_k"] == pytest.approx(sigmas(model.k), rel=1e-5)
    assert set(parts.reasons) == {"query"}
    assert parts.reasons["query"].startswith("queries ")
    assert "{" not in parts.reasons["query"]


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_few_tokens_do_not_make_a_projection_unknown(tokens: int) -> None:
    """Whether a norm and a rotary embedding came between, too few numbers cannot tell."""
    model, x = built(FINE["RMSNorm, turned"])
    parts, figures = parts_of(model, x[:1, :tokens])
    assert parts.reasons == {}
    assert figures["sigma_q"] == pytest.approx(sigmas(model.q), rel=1e-5)


def test_values_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from entropy_monitor.hooks import verdicts

    asked = []
    agree = verdicts.agree
    monkeypatch.setattr(verdicts, "agree", lambda *args: (asked.append(1), agree(*args))[1])
    model, x = built(FINE["turned"])
    recorder = Recorder("all")
    watcher = Watcher(model, recorder, Guard(strict=True))
    counts = []
    for step in range(3):
        recorder.begin(step)
        watcher.arm()
        model(x)
        watcher.disarm()
        counts.append(len(asked))
    assert counts == [1, 1, 1]
