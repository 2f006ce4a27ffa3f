"""Kernels that need a GPU, against the same attention by `F.scaled_dot_product_attention` on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import entropy_monitor as em

WIDTH, HEADS, TOKENS = 64, 4, 48

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Causal attention of `[B, T, H, D]`."""


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    flash_attn = pytest.importorskip("flash_attn", reason="needs flash-attn")
    out: Tensor = flash_attn.flash_attn_func(q, k, v, causal=True)
    return out


def xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    ops = pytest.importorskip("xformers.ops", reason="needs xformers")
    out: Tensor = ops.memory_efficient_attention(q, k, v, attn_bias=ops.LowerTriangularMask())
    return out


def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, q.shape[1], k.shape[1], device=q.device)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out: Any = torch.compile(flex_attention)(q, k, v, block_mask=mask)
    return out.transpose(1, 2)


KERNELS: dict[str, Attend] = {
    "F.scaled_dot_product_attention": sdpa,
    "FlexAttention, compiled": flex,
    "flash-attn": flash,
    "xformers": xformers,
}


class Attention(nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in self.qkv(x).chunk(3, dim=-1))
        return self.out(self.attend(q, k, v).flatten(2))


def built(attend: Attend) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = Attention(attend)
    with torch.no_grad():
        model.qkv.weight.mul_(4)
    return model.to(torch.bfloat16), torch.randn(2, TOKENS, WIDTH).to(torch.bfloat16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.matrix(group="Kernels on a GPU", row=name, column="bf16"))
        for name in KERNELS
    ],
)
def test_a_kernel(name: str) -> None:
    model, x = built(KERNELS[name])
    model, x = model.cuda(), x.cuda()
    if name == "flash-attn":
        pytest.importorskip("flash_attn", reason="needs flash-attn")
    if name == "xformers":
        pytest.importorskip("xformers.ops", reason="needs xformers")
    seen: list[Tensor] = []

    def see(attend: Attend) -> Attend:
        def attending(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            seen.extend(t.detach() for t in (q, k))
            return attend(q, k, v)

        return attending

    model.attend = see(model.attend)
    table = em.measure(model, x)
    q, k = (t.transpose(1, 2).double().cpu() for t in seen[-2:])
    logits = q @ k.mT * q.shape[-1] ** -0.5
    logits = logits.masked_fill(torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1), -torch.inf)
    expected = torch.special.entr(logits.softmax(-1)).sum(-1).mean((0, 2))
    got = torch.tensor(table["entropy"].to_numpy(), dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)
