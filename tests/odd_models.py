"""Models for the doctor: `module:function`, one of a library, and some whose attention cannot be seen."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

WIDTH, HEADS, TOKENS = 16, 2, 6


class Kernel(torch.autograd.Function):
    """Attention in a kernel of one's own, as an extension has it: no torch function shows it."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        ctx.save_for_backward(q, k, v, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx, g: Tensor):
        q, k, v, out, logsumexp = ctx.saved_tensors
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return tuple(backward(g, q, k, v, out, logsumexp, 0.0, False))


class KernelAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2).contiguous() for part in parts)
        return Kernel.apply(q, k, v).transpose(1, 2).flatten(2)


class Odd(nn.Module):
    """Causal attention that is seen, one in a kernel, one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.kernel = KernelAttention()
        self.unused = nn.MultiheadAttention(WIDTH, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.full((x.shape[1], x.shape[1]), -math.inf).triu(1)
        x = x + self.seen(x, x, x, attn_mask=mask, need_weights=False)[0]
        return x + self.kernel(x)


class Restless(nn.Module):
    """Its output tells whether it is watched: hooks that every module runs are seen by it."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x)[0] + len(nn.modules.module._global_forward_hooks)


class Random(nn.Module):
    """Not the same twice."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.calls = [0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0] += 1
        return self.attn(x, x, x)[0] * self.calls[0]


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.LazyLinear(WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def inputs() -> Tensor:
    return torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))


def odd():
    torch.manual_seed(0)
    return Odd(), inputs()


def restless():
    torch.manual_seed(0)
    return Restless().eval(), (inputs(),)


def random():
    torch.manual_seed(0)
    return Random(), {"x": inputs()}


def lazy():
    return Lazy(), inputs()


def exploding():
    model, x = Lazy(), inputs()
    return model, x * math.inf


def compiled():
    torch.manual_seed(0)
    model = nn.Sequential(*(Lazy() for _ in range(2)))
    model(inputs())
    model[1] = torch.compile(model[1], backend="eager")
    return model, inputs()


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=50, n_positions=32))
    tokens = torch.randint(0, 50, (2, 14))
    return model, {"input_ids": tokens, "labels": tokens}


def no_pair():
    return Lazy()


def no_model():
    return "gpt2", inputs()


def wrong_inputs():
    return Odd(), 3


def failing_build():
    raise FileNotFoundError("weights.pt")


def failing_forward():
    return Odd(), torch.zeros(2, TOKENS, WIDTH + 1)


def without_attention():
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()), inputs()


def on_meta():
    return Odd().to("meta"), inputs()


nothing = 3
