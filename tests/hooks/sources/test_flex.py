from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as module
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.attention.flex_attention import flex_attention as early

import entropy_monitor as em
from entropy_monitor import measures
from entropy_monitor.hooks.sources.flex import _Modified
from tests.hooks.sources.reference import B, D, H, K, Projected, T, check, check_model, figures

DOCUMENTS = torch.tensor([[0] * 4 + [1] * 7, [0] * 9 + [1] * 2])
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
BIAS = torch.randn(H, T, T)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without")
        yield


class Flex(Projected):
    def __init__(self, call: Callable[..., Any] = early, key_heads: int = H, **options: Any) -> None:
        super().__init__(key_heads)
        self.call, self.options = call, options

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in self.qkv(x))
        out = self.call(q, k, v, enable_gqa=k.shape[1] != H, **self.options)
        out = out[0] if isinstance(out, tuple) else out
        return self.out(out.transpose(1, 2).flatten(2))


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def document(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (DOCUMENTS[b, i] == DOCUMENTS[b, j]) & (i >= j)


def by_head(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (i - j).abs() <= h


def alibi(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return score - SLOPES[h] * (i - j)


def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return 3 * torch.tanh(score / 3) + BIAS[h][i][j]


def hides(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return torch.where(i >= j, score, -float("inf"))


def mask(mod: Callable[..., Tensor]) -> BlockMask:
    return create_block_mask(mod, B, H, T, T, device="cpu", BLOCK_SIZE=4)


CASES: dict[str, tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = {
    "plain": ({}, lambda u: u),
    "causal": (
        {"block_mask": mask(causal)},
        lambda u: u.masked_fill(~torch.ones(T, T).tril().bool(), -torch.inf),
    ),
    "documents": (
        {"block_mask": mask(document)},
        lambda u: u.masked_fill(
            ~((DOCUMENTS[:, :, None] == DOCUMENTS[:, None]) & torch.ones(T, T).tril().bool())[:, None],
            -torch.inf,
        ),
    ),
    "by head": (
        {"block_mask": mask(by_head)},
        lambda u: u.masked_fill(
            (torch.arange(T)[:, None] - torch.arange(T)).abs() > torch.arange(H)[:, None, None], -torch.inf
        ),
    ),
    "alibi": (
        {"score_mod": alibi},
        lambda u: u - SLOPES.double()[:, None, None] * (torch.arange(T)[:, None] - torch.arange(T)),
    ),
    "soft-cap and bias": ({"score_mod": capped}, lambda u: 3 * (u / 3).tanh() + BIAS.double()),
    "score_mod hides": (
        {"score_mod": hides},
        lambda u: u.masked_fill(~torch.ones(T, T).tril().bool(), -torch.inf),
    ),
    "both": (
        {"score_mod": alibi, "block_mask": mask(causal)},
        lambda u: (
            u - SLOPES.double()[:, None, None] * (torch.arange(T)[:, None] - torch.arange(T))
        ).masked_fill(~torch.ones(T, T).tril().bool(), -torch.inf),
    ),
}


@pytest.mark.parametrize("key_heads", [H, K], ids=["heads alike", "grouped"])
@pytest.mark.parametrize("case", CASES)
def test_eager(case: str, key_heads: int) -> None:
    options, expected = CASES[case]
    model, x = Flex(key_heads=key_heads, **options), torch.randn(B, T, H * D)
    table = check_model(model, (x,), expected(model.products(x)))
    check(table, {"sigma_qk": model.sigma_qk()})
    assert (table["floor_row"] <= table["entropy"] + 1e-4).all()
    assert (table["floor_activation"] <= table["floor_row"] + 1e-4).all()
    assert (table["floor_weights"] <= table["floor_activation"] + 1e-4).all()


def test_scale_and_outputs() -> None:
    model, x = Flex(scale=0.7, return_aux=module.AuxRequest(lse=True)), torch.randn(B, T, H * D)
    check_model(model, (x,), model.products(x, 0.7))


def test_temporaries_stay_small() -> None:
    """A long sequence's logits are made piece by piece, what score_mod makes of them too."""
    shapes: list[tuple[int, ...]] = []

    def spy(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + 0 * i

    q = torch.randn(1, 2, 600, 8)
    modify = _Modified(spy, None, q.dtype, compiled=False)

    def keep(logits: Tensor, *place: Any) -> Any:
        shapes.append(tuple(logits.shape))
        return modify(logits, *place)

    whole = measures.row_statistics(q, q, modify=modify)
    parts = measures.row_statistics(q, q, modify=keep, max_bytes=2**20)
    assert len(shapes) > 20
    assert max(torch.Size(s).numel() for s in shapes) * 4 < 2**20 / 8
    torch.testing.assert_close(whole.entropy, parts.entropy)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled_wherever_it_is_kept(backend: str) -> None:
    class Holder:
        attend = staticmethod(torch.compile(early, backend=backend))

    options, expected = CASES["both"]
    model, x = Flex(Holder.attend, **options), torch.randn(B, T, H * D)
    with torch.no_grad():
        model(x)
        em.measure(model, x, rows="all")
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        table = em.measure(model, x, rows="all")
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before, "compiled anew"
        check(table, figures(expected(model.products(x))))
        assert torch.equal(model(x), model(x))


def test_blocks_that_a_compiled_mask_does_not_list() -> None:
    """Compiled, blocks that are not listed are not seen; eager, all are."""
    counts = torch.ones(1, 1, 3, dtype=torch.int32)
    indices = torch.tensor([[[[0, 1, 2], [1, 0, 2], [2, 0, 1]]]], dtype=torch.int32)
    listed = BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=16, seq_lengths=(48, 48))
    x = torch.randn(B, 48, H * D)
    own = torch.arange(48)[:, None] // 16 == torch.arange(48) // 16
    compiled = Flex(torch.compile(early), block_mask=listed)
    eager = Flex(early, block_mask=listed)
    with torch.no_grad():
        u = compiled.products(x)
        out = compiled.out(
            (u.masked_fill(~own, -torch.inf).softmax(-1) @ compiled.qkv(x)[2].double().transpose(1, 2))
            .transpose(1, 2)
            .flatten(2)
            .float()
        )
        torch.testing.assert_close(compiled(x), out, rtol=1e-3, atol=1e-4)  # it is so, in the kernel
        check(em.measure(compiled, x, rows="all"), figures(u.masked_fill(~own, -torch.inf)))
        check(em.measure(eager, x, rows="all"), figures(eager.products(x)))


@torch.no_grad()
def test_transformers() -> None:
    """Its compiled flex path, with a soft-cap, windows, grouped heads and padding, against its eager one."""
    from transformers import AutoModelForCausalLM, Gemma2Config

    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "head_dim": 8,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "query_pre_attn_scalar": 8}
    config = Gemma2Config(**sizes, **heads, sliding_window=4, attn_logit_softcapping=1.5)
    models = {}
    for kind in ("eager", "flex_attention"):
        torch.manual_seed(0)
        models[kind] = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), attn_implementation=kind
        ).eval()
        for name, p in models[kind].named_parameters():
            if "q_proj" in name or "k_proj" in name:
                p.mul_(20)
    tokens, mask = torch.randint(0, 50, (2, 16)), torch.ones(2, 16, dtype=torch.long)
    mask[1, 14:] = 0  # every window still holds a token
    inputs = {"input_ids": tokens, "attention_mask": mask, "use_cache": False}
    tables = {kind: em.measure(model, rows="all", **inputs) for kind, model in models.items()}
    with em.capture(models["flex_attention"], rows="all", maps=True) as seen:
        models["flex_attention"](**inputs)
    with em.capture(models["eager"], rows="all", maps=True) as dense:
        models["eager"](**inputs)
    assert list(tables["eager"]["layer"]) == list(tables["flex_attention"]["layer"])
    for layer, (maps,) in dense.maps.items():
        torch.testing.assert_close(seen.maps[layer][0], maps, rtol=1e-3, atol=1e-4)
    for name in ("entropy", "max_entropy", "max_logit", "sigma_qk", "rows_read"):
        got, want = (torch.tensor(tables[kind][name].values) for kind in ("flex_attention", "eager"))
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_nothing_is_left_behind() -> None:
    code, called = early.__code__, module.flex_attention
    em.measure(Flex(), torch.randn(B, T, H * D))
    assert early.__code__ is code
    assert module.flex_attention is called


def test_training_step_is_the_same() -> None:
    torch.manual_seed(0)
    model, x = (
        Flex(lambda *qkv, **kw: early(*(y.detach() for y in qkv), **kw), score_mod=alibi),
        torch.randn(B, T, H * D),
    )

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(x).square().mean().backward()
        return [p.grad.clone() for p in model.out.parameters()]  # torch has no backward of it on the CPU

    plain = gradients()
    with em.capture(model, rows="all"):
        watched = gradients()
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
