from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

import entropy_monitor as em
from entropy_monitor.remedies.qk_clip.clip import ClippedHead, QKClip
from entropy_monitor.remedies.reparametrization.convert import sigma_reparam

D, H, T, B = 32, 4, 7, 2
HD = D // H


class Separate(nn.Module):
    """Plain q, k, v; keys shared by groups of queries; rotary embeddings or a norm of them on request."""

    def __init__(
        self, key_heads: int = H, *, rotary: bool = False, norm: bool = False, bias: bool = True
    ) -> None:
        super().__init__()
        self.q = nn.Linear(D, D, bias=bias)
        self.k, self.v = (nn.Linear(D, key_heads * HD, bias=bias) for _ in range(2))
        self.o = nn.Linear(D, D)
        self.rotary, self.norm = rotary, nn.RMSNorm(HD) if norm else None

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (f(x).unflatten(-1, (-1, HD)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.norm is not None:
            q, k = self.norm(q), self.norm(k)
        if self.rotary:
            q, k = turn(q), turn(k)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(out.transpose(1, 2).flatten(2))


class Fused(nn.Module):
    """One weight for q, k and v, laid out like [q | k | v], or head by head as GPT-NeoX does."""

    def __init__(self, *, interleaved: bool = False) -> None:
        super().__init__()
        self.qkv, self.interleaved = nn.Linear(D, 3 * D), interleaved

    def forward(self, x: Tensor) -> Tensor:
        if self.interleaved:
            q, k, v = self.qkv(x).unflatten(-1, (H, 3 * HD)).transpose(1, 2).chunk(3, -1)
        else:
            q, k, v = self.qkv(x).unflatten(-1, (3, H, HD)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class ByHand(nn.Module):
    """Written by hand, with biases of every head on its logits and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.bias = Separate(), nn.Parameter(torch.randn(H, T, T) * 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inner.heads(x)
        scores = q @ k.transpose(-1, -2) / math.sqrt(HD) + self.bias
        hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
        return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)


def turn(x: Tensor) -> Tensor:
    angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * 0.3 ** torch.arange(HD // 2, dtype=x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


@contextmanager
def products() -> Iterator[list[Tensor]]:
    """The scaled products of each call of attention, `[B, H, T, S]`, -inf where hidden: told densely."""
    seen: list[Tensor] = []
    real = F.scaled_dot_product_attention

    def dense(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        logits = (q @ keys.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            logits = logits.masked_fill(torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
        if attn_mask is not None:
            logits = logits.masked_fill(
                ~attn_mask if attn_mask.dtype == torch.bool else attn_mask < -1e9, -torch.inf
            )
        seen.append(logits.detach())
        return real(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    F.scaled_dot_product_attention = dense
    try:
        yield seen
    finally:
        F.scaled_dot_product_attention = real


@torch.no_grad()
def logits_of(model: nn.Module, run: Callable[[nn.Module], object]) -> list[Tensor]:
    with products() as seen:
        run(model)
    return seen


def top(logits: Tensor) -> Tensor:
    return logits.amax((0, 2, 3))


def x_of(seed: int = 0) -> Tensor:
    return torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, run: Callable[[nn.Module], object], **kwargs) -> list[ClippedHead]:
    with QKClip(model, **kwargs) as clip:
        run(model)
        return clip.step()


IDS = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(0))
SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "vocab_size": 32,
}


def llama() -> nn.Module:
    return hf.LlamaModel(hf.LlamaConfig(**SIZES, num_key_value_heads=2, initializer_range=0.5))


def bert() -> nn.Module:
    return hf.BertModel(hf.BertConfig(**SIZES, initializer_range=0.5))


def gpt2() -> nn.Module:
    return hf.GPT2Model(hf.GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=32, initializer_range=0.5))


def neox() -> nn.Module:
    return hf.GPTNeoXModel(hf.GPTNeoXConfig(**SIZES, initializer_range=0.5))


def ids(model: nn.Module) -> object:
    return model(input_ids=IDS)


def tokens(model: nn.Module) -> object:
    return model(x_of())


MODELS = {
    "separate": (Separate, tokens),
    "no bias": (lambda: Separate(bias=False), tokens),
    "grouped": (lambda: Separate(2), tokens),
    "one key head": (lambda: Separate(1), tokens),
    "rotary": (lambda: Separate(2, rotary=True), tokens),
    "fused": (Fused, tokens),
    "interleaved": (lambda: Fused(interleaved=True), tokens),
    "llama": (llama, ids),
    "bert": (bert, ids),
    "gpt2": (gpt2, ids),
    "neox": (neox, ids),
}


def made(name: str) -> tuple[nn.Module, Callable[[nn.Module], object]]:
    torch.manual_seed(1)
    make, run = MODELS[name]
    model = make().double()
    if run is tokens:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(3)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for attribute in ("attn_dropout", "attention_dropout", "dropout_prob"):
        for module in model.modules():
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    return model.train(), run


@pytest.mark.parametrize("balance", [0.5, 1.0, 0.0, 0.3])
@pytest.mark.parametrize("name", MODELS)
def test_of_the_same_forward_clipped_heads_reach_the_threshold_and_others_are_the_same(name, balance) -> None:
    model, run = made(name)
    (first, *_) = before = logits_of(model, run)
    threshold = float(top(first).sort().values[-2:].mean())  # one head of the first layer is above
    clipped = train(model, run, threshold=threshold, balance=balance)
    (after, *_) = logits_of(model, run)
    layers = sorted({c.layer for c in clipped}, key=[c.layer for c in clipped].index)
    assert len(before) == (2 if run is ids else 1)
    mine = {c.head: c for c in clipped if c.layer == layers[0]}
    over = [h for h in range(H) if float(top(first)[h]) > threshold]
    assert list(mine) == over
    assert len(over) == 1
    for h in range(H):
        if h in mine:
            assert mine[h].max_logit == pytest.approx(float(top(first)[h]), rel=1e-9)
            assert mine[h].factor == threshold / mine[h].max_logit
            assert float(top(after)[h]) <= threshold * (1 + 1e-6)
            assert torch.allclose(after[:, h], first[:, h] * mine[h].factor, rtol=1e-9, atol=1e-12)
        else:
            assert torch.equal(after[:, h], first[:, h])


@pytest.mark.parametrize("name", MODELS)
def test_all_heads_of_all_layers(name) -> None:
    model, run = made(name)
    before = logits_of(model, run)
    threshold = min(float(top(x).min()) for x in before) / 2
    clipped = train(model, run, threshold=threshold)
    assert len(clipped) == H * len(before)
    (first, *_) = logits_of(model, run)
    assert top(first).tolist() == pytest.approx([threshold] * H, rel=1e-9)


@pytest.mark.parametrize("name", ["grouped", "llama", "one key head"])
def test_nothing_is_scaled_up(name) -> None:
    model, run = made(name)
    (first, *_) = logits_of(model, run)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, run, threshold=float(top(first).min()) * 0.9)
    for n, p in model.named_parameters():
        assert bool((p.abs() <= before[n].abs()).all()), n


@pytest.mark.parametrize("name", MODELS)
def test_without_overflow_training_is_the_same_to_the_bit(name) -> None:
    (watched, run), (plain, _) = made(name), made(name)
    optimizers = [torch.optim.SGD(m.parameters(), 1e-3) for m in (watched, plain)]
    with QKClip(watched, threshold=1e9) as clip:
        for _ in range(3):
            for model, optimizer in zip((watched, plain), optimizers, strict=True):
                out = run(model)
                (out if isinstance(out, Tensor) else out[0]).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            versions = [p._version for p in watched.parameters()]
            assert clip.step() == []
            assert [p._version for p in watched.parameters()] == versions
    for a, b in zip(watched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_multihead_attention_of_torch() -> None:
    torch.manual_seed(0)
    for kwargs in ({}, {"kdim": 16, "vdim": 16}, {"bias": False}):
        model = nn.MultiheadAttention(D, H, batch_first=True, **kwargs).double()
        x, y = x_of() * 9, torch.randn(B, T, kwargs.get("kdim", D), dtype=torch.float64)

        def maxima(model=model, x=x, y=y) -> Tensor:
            if model.in_proj_weight is None:
                w, u = model.q_proj_weight, model.k_proj_weight
            else:
                w, u, _ = model.in_proj_weight.chunk(3)
            b, c = (0, 0) if model.in_proj_bias is None else model.in_proj_bias.chunk(3)[:2]
            q, k = (z.unflatten(-1, (H, HD)).transpose(1, 2) for z in (x @ w.T + b, y @ u.T + c))
            return top(q @ k.transpose(-1, -2) * HD**-0.5)

        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        before = maxima().detach()
        threshold = float(before.sort().values[-2])
        clipped = train(model, lambda m, x=x, y=y: m(x, y, y), threshold=threshold)
        assert [c.head for c in clipped] == [int(before.argmax())]
        expected = before.clamp(max=threshold)
        assert torch.allclose(maxima(), expected, rtol=1e-9)


def test_biases_and_hidden_keys_do_not_count() -> None:
    torch.manual_seed(0)
    model = ByHand().double()
    q, k, _ = model.inner.heads(x_of())
    dense = (q @ k.transpose(-1, -2) / math.sqrt(HD)).tril() - torch.full((T, T), torch.inf).triu(1)
    clipped = train(model, tokens, threshold=1e-3)
    assert [c.max_logit for c in clipped] == pytest.approx(top(dense).tolist(), rel=1e-9)
    q, k, _ = model.inner.heads(x_of())
    after = (q @ k.transpose(-1, -2) / math.sqrt(HD)).tril() - torch.full((T, T), torch.inf).triu(1)
    assert top(after).tolist() == pytest.approx([1e-3] * H, rel=1e-9)


def test_the_largest_of_several_forwards_since_the_last_step_counts() -> None:
    model, _ = made("separate")
    both = torch.stack([top(logits_of(model, lambda m, s=s: m(x_of(s)))[0]) for s in (0, 1)])
    assert bool((both[0] != both[1]).all())
    with QKClip(model, threshold=1e-3) as clip:
        model(x_of(0))
        model(x_of(1))
        assert [c.max_logit for c in clip.step()] == pytest.approx(both.amax(0).tolist(), rel=1e-9)
        assert clip.step() == []  # nothing ran since
        model.eval()
        model(x_of(0))
        with torch.no_grad():
            model.train()(x_of(0))
        assert clip.step() == []


def test_rows_read_a_part_of_the_queries() -> None:
    model, _ = made("separate")
    (logits,) = logits_of(model, tokens)
    clipped = train(model, tokens, threshold=1e-6, rows=1)
    rows = [logits[:, :, t].amax((0, 2)).tolist() for t in range(T)]
    above = [{h: pytest.approx(x, rel=1e-9) for h, x in enumerate(row) if x > 1e-6} for row in rows]
    assert {c.head: c.max_logit for c in clipped} in above


def test_calls_itself_after_the_optimizers_step() -> None:
    model, run = made("separate")
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with QKClip(model, optimizer, threshold=1e-3) as clip:
        run(model).sum().backward()
        optimizer.step()
        assert [c.head for c in clip.last] == [0, 1, 2, 3]
        run(model)
    held = model.q.weight.detach().clone()
    optimizer.step()
    assert torch.equal(model.q.weight, held)


def test_beside_a_monitor(tmp_path) -> None:
    model, run = made("llama")
    with em.EntropyMonitor(model, run_dir=tmp_path, every=1) as monitor, QKClip(model, threshold=0.5) as clip:
        counts = []
        for _ in range(2):
            run(model)
            counts.append(len(clip.step()))
            monitor.step(1.0)
    heads = em.load_run(tmp_path).heads
    assert counts[0] == 2 * H
    assert heads[heads.step == 0].max_logit.max() > 0.5
    first = heads[(heads.step == 1) & (heads.layer_index == 0)]
    assert first.max_logit.max() <= 0.5 * (1 + 1e-5)


def test_layers_that_share_their_weights_are_clipped_by_the_largest() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = self.b = Separate()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) * 5)

    torch.manual_seed(0)
    model = Twice().double()
    before = [top(x) for x in logits_of(model, tokens)]
    clipped = train(model, tokens, threshold=1e-3)
    assert len(clipped) == H
    assert [c.max_logit for c in clipped] == pytest.approx(torch.stack(before).amax(0).tolist(), rel=1e-9)


def test_keys_that_make_values_or_other_layers_keys_too_are_left_alone() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.p, self.k = (nn.Linear(D, D) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            q, p, k = (f(x).unflatten(-1, (H, HD)).transpose(1, 2) for f in (self.q, self.p, self.k))
            y = F.scaled_dot_product_attention(q, k, k) + F.scaled_dot_product_attention(p, k, k)
            return y.transpose(1, 2).flatten(2)

    torch.manual_seed(0)
    model = Shared().double()
    k = model.k.weight.detach().clone()
    first, second = logits_of(model, tokens)
    train(model, tokens, threshold=1e-3)
    after = logits_of(model, tokens)
    assert torch.equal(model.k.weight, k)
    for old, new in zip((first, second), after, strict=True):
        assert torch.allclose(new, old / top(old).view(H, 1, 1) * 1e-3, rtol=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_change_nothing(bad: float) -> None:
    model, _ = made("separate")
    held = copy.deepcopy(model.state_dict())
    with QKClip(model, threshold=1e-3) as clip:
        x = x_of()
        x[0, 0, 0] = bad
        model(x)
        assert clip.step() == []
    assert all(torch.equal(v, held[n]) for n, v in model.state_dict().items())


def test_low_precision() -> None:
    torch.manual_seed(0)
    model = Separate().to(torch.bfloat16)
    x = x_of().bfloat16() * 8
    with QKClip(model, threshold=0.5) as clip:
        model(x)
        first = clip.step()
        model(x)
        second = clip.step()
    assert len(first) == H
    assert all(c.max_logit <= 0.5 * 1.02 for c in second)


def test_under_autocast() -> None:
    torch.manual_seed(0)
    model, x = Separate(), x_of().float() * 8
    with QKClip(model, threshold=0.5) as clip:
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                model(x).sum().backward()
            clipped = clip.step()
    assert all(c.max_logit <= 0.5 * 1.02 for c in clipped)


def test_compiled() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Separate(2)
    compiled = torch.compile(model, backend="aot_eager")
    x = x_of().float()
    (logits,) = logits_of(copy.deepcopy(model), lambda m: m(x))
    with QKClip(compiled, threshold=1e-3) as clip:
        compiled(x).sum().backward()
        clipped = clip.step()
    assert [c.max_logit for c in clipped] == pytest.approx(top(logits).tolist(), rel=1e-4)
    (logits,) = logits_of(model, lambda m: m(x))
    assert top(logits).tolist() == pytest.approx([1e-3] * H, rel=1e-5)


class Latent(nn.Module):
    """Low-rank queries, as in DeepSeek's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.norm, self.up = nn.Linear(D, 8), nn.RMSNorm(8), nn.Linear(8, D)
        self.k = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (
            y.unflatten(-1, (H, HD)).transpose(1, 2) for y in (self.up(self.norm(self.down(x))), self.k(x))
        )
        return F.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2)


class SharedQK(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qk, self.v = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, v = (f(x).unflatten(-1, (H, HD)).transpose(1, 2) for f in (self.qk, self.v))
        return F.scaled_dot_product_attention(q, q, v).transpose(1, 2).flatten(2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.unflatten(-1, (H, HD)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class ValueIsQuery(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        return attend(q, self.k(x), q)


class TwoKeys(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.p, self.v = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, p, v = (f(x) for f in (self.q, self.k, self.p, self.v))
        return attend(q, k, v) + attend(q, p, v)


class Crossed(TwoKeys):
    def forward(self, x: Tensor) -> Tensor:
        q, k, p, v = (f(x) for f in (self.q, self.k, self.p, self.v))
        return attend(q, k, v) + attend(p, q, v)


def reparametrized() -> nn.Module:
    return sigma_reparam(Separate().double(), gamma="preserve")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Separate(norm=True).double(),
            r"Separate: its queries are normalised \(QK-norm\).*has nothing to do",
        ),
        (lambda: Separate(norm=True, rotary=True).double(), r"normalised \(QK-norm\)"),
        (reparametrized, "Separate: its weight is parametrized.*sigma_reparam and the like bound it already"),
        (
            lambda: Latent().double(),
            r"made by several weights \(up.weight, down.weight\), as in low-rank attention",
        ),
        (lambda: SharedQK().double(), "queries and keys share their weights"),
        (lambda: ValueIsQuery().double(), "ValueIsQuery: the weights of its queries make values too"),
        (
            lambda: TwoKeys().double(),
            "weights of its queries make those of another call too, with other keys",
        ),
        (lambda: Crossed().double(), "weights of its queries make the keys of another call too"),
        (lambda: nn.Linear(D, D).double(), "no softmax attention was seen in training before this step"),
    ],
)
def test_what_cannot_be_clipped_is_refused_in_the_first_step(make, message: str) -> None:
    torch.manual_seed(0)
    model = make()
    held = copy.deepcopy(model.state_dict())
    with QKClip(model, threshold=1e-3) as clip:
        model(x_of())
        now = copy.deepcopy(model.state_dict())
        with pytest.raises(em.ConfigurationError, match=message):
            clip.step()
    assert all(torch.equal(v, now[n]) for n, v in model.state_dict().items())
    assert list(held) == list(model.state_dict())


def test_layers_leave_out_what_cannot_be_clipped() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Separate(norm=True), Separate()).double()
    with pytest.raises(em.ConfigurationError, match=r"0: its queries.*Name the other layers alone: layers="):
        train(model, tokens)
    assert {c.layer for c in train(model, tokens, threshold=1e-3, layers=["1"])} == {"1"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 0}, "threshold must be a positive number, such as 100, got 0"),
        ({"threshold": math.inf}, "got inf"),
        ({"threshold": "100"}, "got '100'"),
        ({"balance": 1.5}, "balance is the queries' share .*, got 1.5"),
        ({"balance": math.nan}, "got nan"),
        ({"rows": 0}, "rows must be a positive integer or 'all', got 0"),
        ({"layers": ["x*"]}, r"QKClip: layers: no module is named 'x\*'"),
        ({"layers": ["q", "*.q_proj"]}, r"no module is named '\*.q_proj'; its attention is Separate. Name"),
        ({"layers": []}, r"layers must be 'all', 'attention', a name pattern .*, got \[\]"),
        ({"layers": [0]}, r"layers must be .*, got \[0\]"),
        ({"layers": None}, "layers must be .*, got None"),
        ({"layers": nn.ReLU()}, "layers must be .*, got ReLU"),
        ({"layers": nn.Linear}, "layers must be .*, got <class"),
        ({"owners": "attn"}, "owners must be a list"),
        ({"optimizer": 3}, "optimizer must be a torch.optim.Optimizer or None, got int"),
    ],
)
def test_wrong_input(arguments, message: str) -> None:
    model = Separate()
    with pytest.raises(em.ConfigurationError, match=message):
        QKClip(model, **arguments)
    assert not torch.nn.modules.module._global_forward_hooks


def test_a_model_is_needed() -> None:
    with pytest.raises(em.ConfigurationError, match=r"model must be a torch\.nn\.Module, got str"):
        QKClip("model")


class Blocks(nn.Module):
    """Attention within modules of attention, beside other linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"attn": nn.ModuleDict({"self": Separate()}), "mlp": nn.Linear(D, D)})
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block["mlp"](block["attn"]["self"](x))
        return x


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", [0, 1]),
        ("attention", [0, 1]),
        ("blocks.1.attn.self", [1]),
        (["blocks.1.*", "blocks.0.attn.self"], [0, 1]),
        ("*.1.attn.self.q", [1]),
        (("*.self.k",), [0, 1]),
        ("*.0.attn", [0]),
        (lambda name, module: isinstance(module, Separate) and ".1." in name, [1]),
    ],
)
def test_layers_are_chosen_by_their_names_or_those_of_their_linear_layers(layers, expected) -> None:
    torch.manual_seed(0)
    clipped = train(Blocks().double(), tokens, threshold=1e-6, layers=layers)
    assert sorted({c.layer for c in clipped}) == [f"blocks.{i}.attn.self" for i in expected]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            "*.mlp",
            r"layers='\*.mlp' names none of the attention layers that ran: blocks.0.attn.self, blocks.1.attn",
        ),
        (lambda n, m: False, "layers=<lambda> names none of the attention layers"),
        (
            lambda n, m: m.heads > 2,
            r"blocks.0.attn.self: the function given by layers= failed \(TypeError: '>' not",
        ),
    ],
)
def test_a_choice_of_no_attention_layer_is_refused(layers, message: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(em.ConfigurationError, match=message):
        train(Blocks().double(), tokens, layers=layers)


def test_queries_of_llama_choose_its_attention() -> None:
    model, run = made("llama")
    clipped = train(model, run, threshold=1e-3, layers="*.1.*.q_proj")
    assert {c.layer for c in clipped} == {"layers.1.self_attn"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: sigma_reparam(m, layers=["q"], gamma="preserve"), "Separate: its weight is parametrized"),
        (lambda m: sigma_reparam(m, layers=["k"], gamma="preserve"), "Separate: its weight is parametrized"),
        (
            lambda m: nn.utils.spectral_norm(m.q),
            "its parameter q.weight is q.weight_orig now; make a new QKClip",
        ),
        (
            lambda m: setattr(m.k, "bias", nn.Parameter(m.k.bias.detach().clone())),
            "its parameter k.bias is no parameter of the model now",
        ),
    ],
)
def test_weights_that_are_parametrized_or_replaced_meanwhile_are_refused(change, message: str) -> None:
    model, run = made("separate")
    with QKClip(model, threshold=1e-3) as clip:
        run(model)
        assert len(clip.step()) == H
        change(model)
        run(model.requires_grad_())
        held = copy.deepcopy(model.state_dict())
        with pytest.raises(em.ConfigurationError, match=message):
            clip.step()
    assert all(torch.equal(v, held[n]) for n, v in model.state_dict().items())


def test_a_layer_that_is_refused_later_is_left_alone_and_logged_once(caplog) -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([Separate(), Separate(norm=True)]).double()
    with QKClip(model, threshold=1e-9) as clip, caplog.at_level(logging.WARNING, "entropy_monitor"):
        # A list has no forward of its own, and each layer counts as one that runs by itself.
        model[0](x_of())
        assert {c.layer for c in clip.step()} == {"0"}
        assert not caplog.records
        for _ in range(2):
            model[1](model[0](x_of()))
            assert {c.layer for c in clip.step()} <= {"0"}
    assert len(caplog.records) == 1
    assert "QKClip leaves 1 alone: its queries are normalised (QK-norm)" in caplog.text


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_frozen_keys_are_left_alone_and_queries_take_all(part: str) -> None:
    model, run = made("grouped")
    getattr(model.k, part).requires_grad_(False)
    held = copy.deepcopy(model.k.state_dict())
    (before,) = logits_of(model, run)
    assert len(train(model, run, threshold=1e-3)) == H
    (after,) = logits_of(model, run)
    assert all(torch.equal(v, held[n]) for n, v in model.k.state_dict().items())
    assert torch.allclose(after, before / top(before).view(H, 1, 1) * 1e-3, rtol=1e-9)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_layers_with_frozen_queries_are_left_alone_and_logged_once(part: str, caplog) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Separate(), Separate()).double()
    frozen = getattr(model[0].q, part).requires_grad_(False)
    held = copy.deepcopy(model[0].state_dict())
    with QKClip(model, threshold=1e-6) as clip, caplog.at_level(logging.WARNING, "entropy_monitor"):
        for _ in range(2):
            tokens(model)
            assert {c.layer for c in clip.step()} <= {"1"}
        assert all(torch.equal(v, held[n]) for n, v in model[0].state_dict().items())
        assert len(caplog.records) == 1
        assert "QKClip leaves 0 alone: the weights of its queries are frozen" in caplog.text
        frozen.requires_grad_()
        tokens(model)
        assert {c.layer for c in clip.step()} >= {"0"}


def test_attention_of_the_model_itself_does_not_own_the_layers_of_its_blocks() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.query, self.key = Separate(), nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            x = self.block(x)
            return attend(self.query(x), self.key(x), x)

    torch.manual_seed(0)
    model = Pooled().double()
    for layers, expected in (("block.q", {"block"}), ("query", {"Pooled"}), ("all", {"block", "Pooled"})):
        clipped = train(model, tokens, threshold=1e-9, layers=layers)
        assert {c.layer for c in clipped} == expected


def test_after_processes_agreed_a_new_layer_is_left_alone_and_logged(caplog) -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([Separate(), Separate()]).double()
    with QKClip(model, threshold=1e-9) as clip, caplog.at_level(logging.WARNING, "entropy_monitor"):
        model[0](x_of())
        clip.step()
        clip._logits.freeze()  # what an agreement of several processes does
        model[1](x_of())
        assert clip.step() == []
    assert "QKClip leaves 1 alone: it ran for the first time after the first step" in caplog.text
