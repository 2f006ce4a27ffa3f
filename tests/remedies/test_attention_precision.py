from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

import entropy_monitor as em
from entropy_monitor.remedies.attention_precision import AttentionPrecision, fp32_attention

D, H, T, B = 32, 4, 9, 2
HD = D // H
LOW = torch.bfloat16


class Attention(nn.Module):
    """Attention in many spellings: what it multiplies and returns is kept."""

    def __init__(self, spelling: str = "sdpa") -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.spelling = spelling
        self.kept: dict[str, Tensor] = {}

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (H, HD)).transpose(1, 2) for f in (self.q, self.k, self.v))
        out = self.attend(q, k, v, mask)
        self.kept = {"q": q, "k": k, "v": v, "out": out}
        return self.o(out.transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if self.spelling == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, mask)
        if self.spelling == "matmul":
            scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(HD)
            if mask is not None:
                scores = scores + mask
            return torch.matmul(F.dropout(scores.softmax(-1), 0.0), v)
        if self.spelling == "operator, rounded":
            return F.softmax(q @ k.mT * HD**-0.5, -1, dtype=torch.float32).to(q.dtype) @ v
        if self.spelling == "einsum":
            scores = torch.einsum("bhtd,bhsd->bhts", q, k) * HD**-0.5
            return torch.einsum("bhts,bhsd->bhtd", torch.softmax(scores, -1), v)
        q, k, v = (y.flatten(0, 1) for y in (q, k, v))
        if self.spelling == "baddbmm":
            empty = torch.empty(q.shape[0], T, T, dtype=q.dtype)
            scores = torch.baddbmm(empty, q, k.mT, beta=0, alpha=HD**-0.5)
        else:
            scores = torch.bmm(q, k.mT) * HD**-0.5
        return torch.bmm(scores.softmax(-1), v).unflatten(0, (B, H))


class Torch(nn.Module):
    def __init__(self, need_weights: bool = False) -> None:
        super().__init__()
        self.attn, self.need_weights = nn.MultiheadAttention(D, H, batch_first=True), need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=self.need_weights)[0]


SPELLINGS = ["sdpa", "matmul", "operator, rounded", "einsum", "bmm", "baddbmm"]


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(D), attention, nn.Sequential(nn.Linear(D, D), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x)


def x_of(dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(B, T, D, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)


def block(attention: nn.Module, mode: str) -> tuple[nn.Module, Tensor, Callable]:
    """A block, its input, and the context that its forward runs in."""
    torch.manual_seed(0)
    model = Block(attention)
    with torch.no_grad():
        for p in model.attn.parameters():
            p.mul_(2)
    if mode == "autocast":
        return model, x_of(), lambda: torch.autocast("cpu", LOW)
    return model.to(LOW), x_of(LOW), nullcontext


def reference(attention: Attention) -> tuple[Tensor, Tensor]:
    """Logits and output in float64, of the q, k and v that entered attention."""
    q, k, v = (attention.kept[name].detach().double() for name in "qkv")
    logits = q @ k.mT * HD**-0.5
    return logits, logits.softmax(-1) @ v


@contextmanager
def softmax_inputs() -> Iterator[list[Tensor]]:
    """What every softmax is given, seen below all modes."""
    seen: list[Tensor] = []

    class Below(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "softmax" in str(func) and "backward" not in str(func):
                seen.append(args[0].detach().clone())
            return func(*args, **(kwargs or {}))

    with Below():
        yield seen


@pytest.mark.parametrize("mode", ["autocast", "pure"])
@pytest.mark.parametrize("spelling", SPELLINGS[1:])
def test_logits_of_attention_written_by_hand_are_those_of_float32(spelling: str, mode: str) -> None:
    model, x, context = block(Attention(spelling), mode)

    def error() -> float:
        with context(), softmax_inputs() as seen:
            model(x)
        exact, _ = reference(model.attn)
        (logits,) = seen
        return float((logits.double().reshape(exact.shape) - exact).abs().max() / exact.abs().max())

    assert error() > 5e-4
    with fp32_attention(model):
        assert error() < 1e-6
    assert error() > 5e-4


@pytest.mark.parametrize("mode", ["autocast", "pure"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_output_is_rounded_once(spelling: str, mode: str) -> None:
    model, x, context = block(Attention(spelling), mode)
    with fp32_attention(model), context():
        model(x)
    _, exact = reference(model.attn)
    out = model.attn.kept["out"]
    assert out.dtype is LOW
    if spelling == "operator, rounded":  # its own code rounds the weights
        assert (out.double() - exact).abs().max() <= 2**-7 * exact.abs().max()
    else:
        assert ((out.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()


@pytest.mark.parametrize("mode", ["autocast", "pure"])
@pytest.mark.parametrize("spelling", [*SPELLINGS, "torch", "torch, weights"])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_else_changes_its_dtype(spelling: str, mode: str, training: bool) -> None:
    attention = Torch("weights" in spelling) if "torch" in spelling else Attention(spelling)
    model, x, context = block(attention, mode)
    model.train(training)

    def dtypes() -> list[tuple[str, torch.dtype]]:
        seen: list[tuple[str, torch.dtype]] = []
        handles = [
            m.register_forward_hook(lambda m, i, out, n=n: seen.extend((n, t.dtype) for t in leaves(out)))
            for n, m in model.named_modules()
        ]
        with context(), torch.set_grad_enabled(training):
            out = model(x)
        if training:
            out.float().square().sum().backward()
            seen.extend((n, p.grad.dtype) for n, p in model.named_parameters())
            model.zero_grad()
        for handle in handles:
            handle.remove()
        return seen

    before = dtypes()
    assert len(before) > 5
    with fp32_attention(model):
        assert dtypes() == before
        assert not torch.is_autocast_enabled("cpu")


def leaves(out: object) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]


@pytest.mark.parametrize("mode", ["autocast", "pure"])
@pytest.mark.parametrize(
    "case", [{}, {"key_padding_mask": True}, {"attn_mask": True}, {"need_weights": True}]
)
def test_multihead_attention_of_torch(case: dict, mode: str) -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(D, H, batch_first=True, add_bias_kv="attn_mask" in case)
    with torch.no_grad():
        model.in_proj_weight.mul_(4)
    x, dtype = x_of(), torch.float32
    if mode == "pure":
        model, x, dtype = model.to(LOW), x.to(LOW), LOW
    kwargs: dict = {"need_weights": "need_weights" in case, "average_attn_weights": False}
    if "key_padding_mask" in case:
        kwargs["key_padding_mask"] = torch.arange(T).expand(B, T) > 6
    if "attn_mask" in case:
        kwargs["attn_mask"] = torch.ones(T, T, dtype=torch.bool).triu(1)
    context = nullcontext if mode == "pure" else lambda: torch.autocast("cpu", LOW)
    handle = fp32_attention(model, lambda name, module: module is model)
    with context():
        out, weights = model(x, x, x, **kwargs)
        # The projections as they are; the rest in float64.
        q, k, v = F.linear(x, model.in_proj_weight, model.in_proj_bias).chunk(3, -1)
    q, k, v = (y.double() for y in (q, k, v))
    if model.bias_k is not None:
        k, v = (
            torch.cat([y, z.detach().double().expand(B, 1, D)], 1)
            for y, z in ((k, model.bias_k), (v, model.bias_v))
        )
    q, k, v = (y.unflatten(-1, (H, HD)).transpose(1, 2) for y in (q, k, v))
    logits = q @ k.mT * HD**-0.5
    if "key_padding_mask" in case:
        logits = logits.masked_fill(kwargs["key_padding_mask"][:, None, None], -torch.inf)
    if "attn_mask" in case:
        logits = logits.masked_fill(F.pad(kwargs["attn_mask"], (0, 1)), -torch.inf)
    exact = logits.softmax(-1)
    with context():
        expected = model.out_proj((exact @ v).transpose(1, 2).flatten(2).to(LOW).to(dtype))
    # One rounding of the heads' outputs may fall the other way.
    assert (out.double() - expected.double()).abs().max() <= 2**-7 * expected.double().abs().max()
    if weights is not None:
        assert weights.dtype is LOW
        assert (weights.double() - exact).abs().max() <= 2**-9
    handle.remove()


def test_entropy_under_autocast_is_that_of_float32() -> None:
    model, x, context = block(Attention("matmul"), "autocast")
    with context():
        low = em.measure(model, x).entropy.to_numpy()
        with fp32_attention(model):
            high = em.measure(model, x)
            model(x)
    logits, _ = reference(model.attn)
    exact = torch.special.entr(logits.softmax(-1)).sum(-1).mean((0, 2)).numpy()
    assert list(high.layer) == ["attn"] * H
    assert abs(high.entropy.to_numpy() - exact).max() < 2e-6
    assert abs(low - exact).max() > 2e-5
    assert list(high.max_logit) == pytest.approx(logits.amax((0, 2, 3)).tolist(), rel=1e-6)


@pytest.mark.parametrize("spelling", [*SPELLINGS, "torch"])
def test_measured_and_watched_as_before(spelling: str) -> None:
    model, x, _context = block(Torch() if spelling == "torch" else Attention(spelling), "pure")
    before = em.measure(model, x)
    with fp32_attention(model):
        after = em.measure(model, x)
    assert list(after.layer) == list(before.layer)
    assert abs(after.entropy - before.entropy).max() < 2e-2
    assert after.sigma_q.notna().all()


@pytest.mark.parametrize("spelling", [*SPELLINGS, "torch", "torch, weights"])
def test_in_float32_it_changes_nothing(spelling: str) -> None:
    torch.manual_seed(0)
    model = Block(Torch("weights" in spelling) if "torch" in spelling else Attention(spelling))
    before = model(x_of())
    with fp32_attention(model):
        assert torch.equal(model(x_of()), before)


@pytest.mark.parametrize("mode", ["autocast", "pure"])
@pytest.mark.parametrize("spelling", ["sdpa", "matmul", "torch"])
def test_compiles_without_a_break(spelling: str, mode: str) -> None:
    torch._dynamo.reset()
    model, x, context = block(Torch() if spelling == "torch" else Attention(spelling), mode)
    fp32_attention(model)
    with context():
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        out = compiled(x)
    assert out.dtype is expected.dtype
    assert (out.float() - expected.float()).abs().max() <= 2**-6 * expected.float().abs().max()


@pytest.mark.parametrize("mode", ["autocast", "pure"])
def test_under_activation_checkpointing(mode: str) -> None:
    model, x, context = block(Attention("matmul"), mode)
    fp32_attention(model)
    grads = []
    for again in (False, True):
        with context():
            out = checkpoint(model, x, use_reentrant=False) if again else model(x)
        out.float().square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_state_dicts_copies_and_pickles() -> None:
    model, x, _context = block(Attention("matmul"), "pure")
    keys, plain = list(model.state_dict()), model(x)
    handle = fp32_attention(model)
    assert list(model.state_dict()) == keys
    out = model(x)
    assert not torch.equal(out, plain)
    model.attn.kept = {}
    other, its_handle = copy.deepcopy((model, handle))
    with torch.no_grad():
        other.attn.q.weight.zero_()
    assert torch.equal(model(x), out)
    assert not torch.equal(other(x), out)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), out)
    its_handle.remove()
    assert torch.equal(other(x), plain)
    assert torch.equal(model(x), out)
    model.attn.kept = {}
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), out)
    handle.remove()
    handle.remove()
    assert torch.equal(model(x), plain)
    assert "forward" not in model.attn.__dict__


def test_a_forward_that_was_replaced_before_is_kept() -> None:
    model, x, _ = block(Attention("matmul"), "pure")
    calls = []
    inner = model.attn.forward
    model.attn.forward = lambda *args: (calls.append(1), inner(*args))[1]
    mine = model.attn.forward
    with fp32_attention(model):
        model(x)
    assert calls == [1]
    assert model.attn.forward is mine


@pytest.mark.parametrize("padded", [False, True])
def test_fused_layers_of_torch_are_not_taken(padded: bool) -> None:
    torch.manual_seed(0)
    model = (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(D, H, D, 0.0, batch_first=True), 2).to(LOW).eval()
    )
    x = x_of(LOW)
    mask = torch.arange(T).expand(B, T) > 6 if padded else None
    with torch.no_grad(), fp32_attention(model) as handle:
        assert handle.layers == ("layers.0.self_attn", "layers.1.self_attn")
        out = model(x, src_key_padding_mask=mask)
        assert len(em.measure(model, x)) == 2 * H
        model.train()
        assert torch.equal(model(x, src_key_padding_mask=mask), out)


SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "vocab_size": 32,
}
IDS = {"input_ids": torch.arange(18).view(2, 9)}
FAMILIES = {
    "bert": lambda a: hf.BertModel(hf.BertConfig(**SIZES, attn_implementation=a)),
    "llama": lambda a: hf.LlamaModel(hf.LlamaConfig(**SIZES, num_key_value_heads=2, attn_implementation=a)),
    "qwen3": lambda a: hf.Qwen3Model(
        hf.Qwen3Config(**SIZES, head_dim=8, num_key_value_heads=2, attn_implementation=a)
    ),
    "gpt2": lambda a: hf.GPT2Model(
        hf.GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=32, attn_implementation=a)
    ),
    "t5": lambda a: hf.T5EncoderModel(
        hf.T5Config(
            d_model=32, d_kv=8, d_ff=32, num_heads=4, num_layers=2, vocab_size=32, attn_implementation=a
        )
    ),
    "bloom": lambda a: hf.BloomModel(hf.BloomConfig(hidden_size=32, n_head=4, n_layer=2, vocab_size=32)),
    "gptj": lambda a: hf.GPTJModel(
        hf.GPTJConfig(
            n_embd=32, n_head=4, n_layer=2, rotary_dim=4, vocab_size=32, bos_token_id=0, eos_token_id=0
        )
    ),
}


@pytest.mark.parametrize("mode", ["autocast", "pure"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_transformers(family: str, implementation: str, mode: str) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family](implementation).eval()
    if mode == "pure":
        model = model.to(LOW)
    context = nullcontext if mode == "pure" else lambda: torch.autocast("cpu", LOW)
    with context():
        plain = model(**IDS)[0]
        with fp32_attention(model) as handle, softmax_inputs() as seen:
            out = model(**IDS)[0]
        assert len(handle.layers) == 2
        assert torch.equal(model(**IDS)[0], plain)
    assert out.dtype is plain.dtype
    assert (out - plain).abs().max() < 0.1 * plain.abs().max()
    if implementation == "eager" or family in ("bloom", "gptj"):
        assert [x.dtype for x in seen] == [torch.float32] * 2
        assert all(bool((x != x.to(LOW).float()).any()) for x in seen)  # never rounded
    fp32_attention(model)
    model.train()
    with context():
        model(**IDS)[0].float().square().sum().backward()


class Routed(nn.Module):
    """A softmax that belongs to no attention, before one that does; weights that are multiplied with `@`."""

    def __init__(self) -> None:
        super().__init__()
        self.route, self.w, self.attn = (
            nn.Linear(D, 4),
            nn.Parameter(torch.randn(D, D) / 6),
            Attention("matmul"),
        )
        self.kept: dict[str, torch.dtype] = {}

    def forward(self, x: Tensor) -> Tensor:
        gate = self.route(x).softmax(-1)
        y = x @ self.w + x @ self.w.t()
        self.kept = {"gate": gate.dtype, "y": y.dtype}
        return self.attn(y) * gate[..., :1]


@pytest.mark.parametrize("mode", ["autocast", "pure"])
def test_routers_and_weights_are_no_attention(mode: str) -> None:
    model, x, context = block(Routed(), mode)
    with context():
        model(x)
        before = model.attn.kept
        with fp32_attention(model, "attn"):
            model(x)
    assert model.attn.kept == before


@pytest.mark.parametrize(
    ("make", "layers", "message"),
    [
        (lambda: nn.Linear(4, 4), "attention", "no module of Linear looks like attention"),
        (
            lambda: Block(Attention()),
            "atn*",
            r"layers='atn\*' matches no module of Block; its attention is in attn",
        ),
        (lambda: Block(Attention()), ["attn", "x"], "layers='x' matches no module"),
        (lambda: Block(Attention()), lambda name, module: False, "chose no module of Block"),
        (lambda: Block(Attention()), 3, "layers must be 'attention'"),
        (lambda: Block(Attention()), [], "layers must be 'attention'"),
        (lambda: "x", "attention", r"model must be a torch\.nn\.Module, got str"),
    ],
)
def test_wrong_input(make, layers, message: str) -> None:
    model = make()
    with pytest.raises(em.ConfigurationError, match=message):
        fp32_attention(model, layers)
    if isinstance(model, nn.Module):
        assert not [m for m in model.modules() if "forward" in m.__dict__]


def test_twice_is_an_error() -> None:
    model = Block(Attention())
    assert isinstance(fp32_attention(model), AttentionPrecision)
    with pytest.raises(em.ConfigurationError, match="attention of attn runs in float32 already"):
        fp32_attention(model)


def test_kernels_that_are_not_covered_are_refused() -> None:
    model = FAMILIES["llama"]("sdpa")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        em.ConfigurationError, match=r"layers\.0\.self_attn uses flash_attention_2, which cannot"
    ):
        fp32_attention(model)


class Flex(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return flex_attention(q, k, v)


def test_flex_attention_is_refused_when_it_is_called() -> None:
    torch._dynamo.reset()
    model, x, _ = block(Flex(), "pure")
    with torch.no_grad(), fp32_attention(model), pytest.raises(Exception, match="FlexAttention was called"):
        model(x)  # its own compiler wraps our error into one of its own
    assert not torch.overrides._get_current_function_mode_stack()
