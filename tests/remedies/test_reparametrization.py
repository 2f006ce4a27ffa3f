"""Converting whole models: which layers, what stays, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import entropy_monitor as em
from entropy_monitor.errors import ConfigurationError
from entropy_monitor.remedies.reparametrization.folding import scales_of
from tests.remedies.models import images, train_step, vit

Convert = Callable[..., nn.Module]
CONVERSIONS: dict[str, Convert] = {
    "sigma_reparam": lambda model, **kw: em.sigma_reparam(model, gamma="preserve", **kw),
    "spectral_norm": em.spectral_norm,
    "weight_norm": em.weight_norm,
}


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=24, n_head=3, vocab_size=40, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    return GPT2LMHeadModel(config).eval(), {"input_ids": torch.arange(24).view(2, 12)}


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=2, hidden_size=24, num_attention_heads=3, intermediate_size=32, vocab_size=40
    )
    return BertModel(config).eval(), {"input_ids": torch.arange(24).view(2, 12)}


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=40,
    )
    return LlamaForCausalLM(config).eval(), {"input_ids": torch.arange(24).view(2, 12)}


def neox() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        num_hidden_layers=1, hidden_size=24, num_attention_heads=3, intermediate_size=32, vocab_size=40
    )
    return GPTNeoXForCausalLM(config).eval(), {"input_ids": torch.arange(24).view(2, 12)}


def vit_with_patches() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        num_hidden_layers=1,
        hidden_size=24,
        num_attention_heads=3,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
    )
    return ViTModel(config).eval(), {"pixel_values": torch.randn(2, 3, 8, 8)}


def encoder() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 3, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    return model, {"src": torch.randn(2, 5, 24)}


MODELS = {f.__name__: f for f in (gpt2, bert, llama, neox, vit_with_patches, encoder)}


def first_output(out: Any) -> Tensor:
    found: Tensor = out if isinstance(out, Tensor) else out[0]
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fused", ["joint", "qk_v", "each"])
def test_preserve_keeps_what_a_model_computes(name: str, fused: Any) -> None:
    model, inputs = MODELS[name]()
    state = torch.get_rng_state()
    plain = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        before = first_output(model(**inputs))
        em.sigma_reparam(model, gamma="preserve", fused=fused, example_inputs=inputs)
        after = first_output(model(**inputs))
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
    for label, scale in scales_of(model):
        assert scale.gamma.min() > 0, label
        if scale.group is None:
            exact = torch.linalg.matrix_norm(scale.weight.detach().flatten(1).double(), 2)
            assert scale.gamma.item() == pytest.approx(exact.item(), rel=1e-5), label
    em.fold(model)
    assert list(model.state_dict()) == list(plain)
    torch.testing.assert_close(model.state_dict(), plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["gpt2", "neox", "encoder"])
def test_parts_of_fused_weights_have_their_own_norms(name: str) -> None:
    model, inputs = MODELS[name]()
    tensor = {"gpt2": "transformer.h.0.attn.c_attn", "neox": "gpt_neox.layers.0.attention.query_key_value"}
    em.sigma_reparam(model, "attention", gamma="preserve", fused="each", example_inputs=inputs)
    kept = {label: scale for label, scale in scales_of(model) if len(scale.gamma) > 1}
    assert kept
    label, scale = next(iter(kept.items()))
    assert label.startswith(tensor.get(name, "layers.0.self_attn.in_proj_weight"))
    w = scale.weight.detach()
    heads, width = 3, 24
    if name == "gpt2":  # [in, 3 · width], query features first
        parts = w.t().chunk(3)
    elif name == "neox":  # each head has its query, key and value side by side
        parts = w.view(heads, 3, width // heads, width).transpose(0, 1).reshape(3, width, width)
    else:
        parts = w.chunk(3)
    exact = torch.stack([torch.linalg.matrix_norm(part, 2) for part in parts])
    torch.testing.assert_close(scale.gamma.detach(), exact)


def test_joint_takes_a_fused_weight_as_one() -> None:
    model, _ = encoder()
    em.sigma_reparam(model, "attention", gamma="preserve")
    scale = dict(scales_of(model))["layers.0.self_attn.in_proj_weight"]
    torch.testing.assert_close(scale.gamma[0], torch.linalg.matrix_norm(scale.weight, 2))


def test_gamma_one_is_the_papers_and_says_what_it_does(caplog: pytest.LogCaptureFixture) -> None:
    model = vit(dtype=torch.float32)
    with caplog.at_level(logging.WARNING, "entropy_monitor"):
        em.sigma_reparam(model, gamma="one")
    assert "the model computes another function now" in caplog.text
    assert "14 weights to 1" in caplog.text
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert torch.linalg.matrix_norm(module.weight, 2).item() == pytest.approx(1, rel=1e-6)


def test_preserve_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "entropy_monitor"):
        em.sigma_reparam(vit(), gamma="preserve")
    assert not caplog.records


def test_convolutions_are_flattened() -> None:
    torch.manual_seed(0)
    for layer in (nn.Conv1d(3, 8, 5), nn.Conv2d(4, 8, 3, groups=2), nn.Conv3d(2, 4, 2)):
        em.sigma_reparam(layer, gamma="one")
        norm = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
        assert norm.item() == pytest.approx(1, rel=1e-6)


def test_embeddings_and_tied_weights_are_left_alone_unless_asked() -> None:
    model, inputs = gpt2()
    em.sigma_reparam(model, gamma="preserve")
    names = dict(scales_of(model))
    assert not [name for name in names if "wte" in name or "wpe" in name or "lm_head" in name]
    model, inputs = gpt2()
    before = model(**inputs)[0]
    em.sigma_reparam(model, gamma="preserve", tied=True, embeddings=True)
    assert {"transformer.wte.weight", "transformer.wpe.weight"} <= set(dict(scales_of(model)))
    assert (
        model.lm_head.parametrizations.weight.original
        is model.transformer.wte.parametrizations.weight.original
    )
    torch.testing.assert_close(model(**inputs)[0], before, rtol=1e-6, atol=1e-6)
    count = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.SGD(em.param_groups(model, 1e-2))
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    assert torch.equal(model.lm_head.weight, model.transformer.wte.weight)
    em.fold(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert sum(p.numel() for p in model.parameters()) == count - len(names) - 2


def test_layers_can_be_chosen() -> None:
    by_pattern = em.sigma_reparam(vit(), "blocks.*.attn.query", gamma="one")
    assert [label for label, _ in scales_of(by_pattern)] == [
        f"blocks.{i}.attn.query.weight" for i in range(2)
    ]
    by_list = em.sigma_reparam(vit(), ["*.query", "embed"], gamma="one")
    assert len(list(scales_of(by_list))) == 3
    by_function = em.sigma_reparam(vit(), lambda name, layer: "mlp" in name, gamma="one")
    assert len(list(scales_of(by_function))) == 4
    attention = em.sigma_reparam(vit(), "attention", gamma="one")
    assert len(list(scales_of(attention))) == 8


def test_weight_norm_is_torchs() -> None:
    model, twin = vit(), vit()
    y = model(images())
    em.weight_norm(model)
    torch.testing.assert_close(model(images()), y)
    for module in twin.modules():
        if isinstance(module, nn.Linear):
            nn.utils.parametrizations.weight_norm(module)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, twin)]
    for _ in range(3):
        assert train_step(model, optimizers[0]) == train_step(twin, optimizers[1])
    y = model(images())
    em.fold(model)
    torch.testing.assert_close(model(images()), y)
    assert list(model.state_dict()) == list(vit().state_dict())
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in model.parameters())


def test_spectral_norm_agrees_with_torchs() -> None:
    """torch's takes a step before each forward in training; ours starts where it ends up."""
    layer, twin = (nn.Linear(9, 7, dtype=torch.float64) for _ in range(2))
    twin.load_state_dict(layer.state_dict())
    em.spectral_norm(layer)
    nn.utils.parametrizations.spectral_norm(twin, n_power_iterations=500)
    torch.testing.assert_close(layer.weight, twin.weight)
    assert not any("gamma" in name for name, _ in layer.named_parameters())


class Quantized(nn.Linear):
    """As bitsandbytes has them: a Linear whose weight holds integers."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)


def model_with(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), layer)


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Linear(4, 4))


def with_nan() -> nn.Module:
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    return layer


BAD_LAYERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "quantized": (Quantized, r"1\.weight is quantized or not real \(torch\.uint8\)"),
    "meta": (lambda: nn.Linear(4, 4, device="meta"), r"1\.weight is on the meta device"),
    "lazy": (lambda: nn.LazyLinear(4), r"1\.weight has no shape yet"),
    "empty": (lambda: nn.Linear(0, 4), r"1\.weight has shape \(4, 0\)"),
    "not finite": (with_nan, r"1\.weight holds NaN"),
    "parametrized": (
        lambda: nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)),
        r"1\.weight is parametrized already",
    ),
    "converted": (
        lambda: em.sigma_reparam(nn.Linear(4, 4), gamma="one"),
        r"1\.weight is parametrized already",
    ),
    "hooked": (old_weight_norm, r"1\.weight is no parameter"),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("remedy", CONVERSIONS)
@pytest.mark.parametrize("bad", BAD_LAYERS)
def test_what_cannot_be_converted_is_named_and_nothing_is_touched(remedy: str, bad: str) -> None:
    make, message = BAD_LAYERS[bad]
    model = model_with(make())
    keys, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    with pytest.raises(ConfigurationError, match=message) as error:
        CONVERSIONS[remedy](model)
    assert str(error.value).startswith(f"{remedy}: ")
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == kinds


def test_a_failure_half_way_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = vit()
    plain = {key: value.clone() for key, value in model.state_dict().items()}
    register, count = parametrize.register_parametrization, 0

    def fail_late(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == 9:
            raise RuntimeError("planted")
        return register(*args, **kwargs)

    monkeypatch.setattr(parametrize, "register_parametrization", fail_late)
    with pytest.raises(RuntimeError, match="planted"):
        em.sigma_reparam(model, gamma="one")
    assert list(model.state_dict()) == list(plain)
    assert all(torch.equal(value, plain[key]) for key, value in model.state_dict().items())
    assert not list(scales_of(model))


@pytest.mark.parametrize("remedy", CONVERSIONS)
@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("block.*", r"layers='block\.\*' matches no linear layer of VisionTransformer; it has blocks"),
        (["*.query", "nothing"], "layers='nothing' matches no linear layer"),
        (lambda name, layer: False, "matches no linear layer"),
        ([], "layers must be 'all', 'attention', a name pattern"),
        (3, "layers must be 'all', 'attention', a name pattern"),
    ],
)
def test_choices_that_match_nothing(remedy: str, layers: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        CONVERSIONS[remedy](vit(), layers=layers)


def test_models_without_anything_to_convert() -> None:
    with pytest.raises(ConfigurationError, match="Sequential has no linear layer"):
        em.sigma_reparam(nn.Sequential(nn.ReLU()), gamma="one")
    with pytest.raises(ConfigurationError, match="no module of Sequential looks like attention"):
        em.sigma_reparam(nn.Sequential(nn.Linear(3, 3)), "attention", gamma="one")
    with pytest.raises(ConfigurationError, match=r"leaves nothing to do: 0\.weight: an embedding"):
        em.sigma_reparam(nn.Sequential(nn.Embedding(3, 3)), gamma="one")
    with pytest.raises(ConfigurationError, match=r"model must be a torch\.nn\.Module, got str"):
        em.sigma_reparam("model", gamma="one")  # type: ignore[arg-type]


def test_gamma_is_required() -> None:
    with pytest.raises(TypeError, match="gamma"):
        em.sigma_reparam(vit())  # type: ignore[call-arg]
    with pytest.raises(ConfigurationError, match=r"gamma must be 'one'.*got 2"):
        em.sigma_reparam(vit(), gamma=2)  # type: ignore[arg-type]


def test_parts_that_are_not_known_are_asked_for() -> None:
    model, _ = gpt2()
    with pytest.raises(
        ConfigurationError, match=r"c_attn\.weight \(24, 72\) seems to join .* example_inputs"
    ):
        em.sigma_reparam(model, gamma="one", fused="each")
    with pytest.raises(
        ConfigurationError, match="could not be run on example_inputs: ValueError: You have to"
    ):
        em.sigma_reparam(model, gamma="one", fused="each", example_inputs={"nonsense": 3})
    with pytest.raises(ConfigurationError, match="fused must be 'joint', 'qk_v' or 'each', got 'both'"):
        em.sigma_reparam(model, gamma="one", fused="both")  # type: ignore[arg-type]
    assert not list(scales_of(model))


def test_wrapped_models_are_refused() -> None:
    class FSDPModule:
        pass

    class Wrapped(nn.Linear, FSDPModule):
        pass

    with pytest.raises(
        ConfigurationError, match=r"wrapped by FSDPModule.*sigma_reparam\(model, …\) first, then wrap"
    ):
        em.sigma_reparam(nn.Sequential(Wrapped(3, 3)), gamma="one")


def test_an_alert_still_reads_a_converted_model() -> None:
    plain, model = vit(dtype=torch.float32), em.sigma_reparam(vit(dtype=torch.float32), gamma="preserve")
    x = images(dtype=torch.float32)
    a, b = em.measure(plain, x), em.measure(model, x)
    for column in ("entropy", "sigma_q", "sigma_k", "sigma_qk", "floor_weights"):
        torch.testing.assert_close(
            torch.tensor(a[column].to_numpy()), torch.tensor(b[column].to_numpy()), rtol=1e-4, atol=1e-6
        )


def test_keys_and_values_that_are_joined_are_told_apart() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=24, n_layer=1, n_head=3, vocab_size=40, add_cross_attention=True)
    model = GPT2LMHeadModel(config).eval()
    inputs = {"input_ids": torch.arange(8)[None], "encoder_hidden_states": torch.randn(1, 5, 24)}
    em.sigma_reparam(model, "attention", gamma="preserve", fused="each", example_inputs=inputs)
    scale = dict(scales_of(model))["transformer.h.0.crossattention.c_attn.weight"]
    exact = torch.stack([torch.linalg.matrix_norm(part, 2) for part in scale.weight.t().chunk(2)])
    torch.testing.assert_close(scale.gamma.detach(), exact.detach())


def test_matrices_that_are_left_alone_are_told(caplog: pytest.LogCaptureFixture) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.ones(2, 3, 3))
            self.out = nn.Linear(3, 3)

    with caplog.at_level(logging.INFO, "entropy_monitor"):
        em.sigma_reparam(Experts(), gamma="preserve")
    assert "left Experts.up alone: in no layer of a kind that is known" in caplog.text
