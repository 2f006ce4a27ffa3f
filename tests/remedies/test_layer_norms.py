from __future__ import annotations

import copy
import io
import math

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

import entropy_monitor as em
from entropy_monitor.remedies.layer_norms import RemovedNorm, is_layer_norm, remove_layer_norms

D = 16


class Block(nn.Module):
    def __init__(self, norm=nn.LayerNorm) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(D), norm(D)
        self.attn = nn.MultiheadAttention(D, 2, batch_first=True)
        self.mlp = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


def norms_of(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if is_layer_norm(m)]


def removed_of(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, RemovedNorm)]


def small(kind: str) -> tuple[nn.Module, dict]:
    ids = torch.arange(10).view(2, 5)
    s = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 32,
        "vocab_size": 32,
    }
    made = {
        "bert": lambda: (hf.BertModel(hf.BertConfig(**s)), {"input_ids": ids}),
        "llama": lambda: (hf.LlamaModel(hf.LlamaConfig(**s)), {"input_ids": ids}),
        "qwen3": lambda: (
            hf.Qwen3Model(hf.Qwen3Config(**s, head_dim=8, num_key_value_heads=1)),
            {"input_ids": ids},
        ),
        "gpt2": lambda: (
            hf.GPT2Model(hf.GPT2Config(n_embd=16, n_head=2, n_layer=2, vocab_size=32)),
            {"input_ids": ids},
        ),
        "t5": lambda: (
            hf.T5Model(hf.T5Config(d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=2, vocab_size=32)),
            {"input_ids": ids, "decoder_input_ids": ids},
        ),
        "vit": lambda: (
            hf.ViTModel(
                hf.ViTConfig(**{k: v for k, v in s.items() if k != "vocab_size"}, image_size=8, patch_size=4)
            ),
            {"pixel_values": torch.randn(2, 3, 8, 8)},
        ),
    }
    return made[kind]()


@pytest.mark.parametrize("kind", ["bert", "llama", "qwen3", "gpt2", "t5", "vit"])
def test_removes_all_norms_of_models_of_transformers(kind: str) -> None:
    model, inputs = small(kind)
    names, before = norms_of(model), dict(model.named_parameters())
    assert remove_layer_norms(model) is model
    assert removed_of(model) == names
    assert norms_of(model) == []
    gone = set(before) - set(dict(model.named_parameters()))
    assert gone == {n for n in before if n.rsplit(".", 1)[0] in names}
    out = model(**inputs)[0]
    out.square().sum().backward()
    assert torch.isfinite(out).all()


def test_equals_the_model_written_without_norms() -> None:
    model = nn.Sequential(Block(), Block(nn.RMSNorm)).double()
    bare = nn.Sequential(Block(nn.Identity), Block(lambda d: nn.Identity())).double()
    remove_layer_norms(model)
    bare.load_state_dict(model.state_dict())
    x = torch.randn(2, 5, D, dtype=torch.float64)
    assert torch.equal(model(x), bare(x))


@pytest.mark.parametrize(
    "layers", ["0.norm*", ["0.norm1", "0.norm2"], lambda name, module: name.startswith("0.")]
)
def test_layers_choose_norms(layers) -> None:
    model = nn.Sequential(Block(), Block())
    remove_layer_norms(model, layers)
    assert removed_of(model) == ["0.norm1", "0.norm2"]
    assert norms_of(model) == ["1.norm1", "1.norm2"]


def test_attention_chooses_the_norms_of_queries_and_keys() -> None:
    model, _ = small("qwen3")
    remove_layer_norms(model, "attention")
    assert removed_of(model) == [f"layers.{i}.self_attn.{r}_norm" for i in range(2) for r in "qk"]


def test_batch_and_group_norms_stay() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.GroupNorm(2, 4), nn.InstanceNorm1d(4), nn.LayerNorm(4))
    remove_layer_norms(model)
    assert removed_of(model) == ["3"]


def test_a_shared_norm_goes_everywhere() -> None:
    model = nn.ModuleDict({"a": nn.LayerNorm(4), "b": nn.Linear(4, 4)})
    model["c"] = model["a"]
    remove_layer_norms(model)
    assert isinstance(model["a"], RemovedNorm)
    assert model["c"] is model["a"]


class AdaptiveLayerNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.modulate = nn.LayerNorm(D, elementwise_affine=False), nn.Linear(D, 2 * D)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulate(condition).chunk(2, -1)
        return self.norm(x) * (1 + scale) + shift


def test_of_an_adaptive_norm_the_modulation_stays() -> None:
    model = nn.ModuleList([AdaptiveLayerNorm()])
    remove_layer_norms(model)
    assert removed_of(model) == ["0.norm"]
    x, c = torch.randn(2, 3, D), torch.randn(2, 3, D)
    scale, shift = model[0].modulate(c).chunk(2, -1)
    assert torch.equal(model[0](x, c), x * (1 + scale) + shift)


class GatedRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return self.weight * x * (1 if gate is None else F.silu(gate))


class LayerNormAct(nn.LayerNorm):
    def __init__(self) -> None:
        super().__init__(D)
        self.act = nn.ReLU()


@pytest.mark.parametrize(
    ("norm", "why"),
    [(GatedRMSNorm, r"more than one input \(x, gate\)"), (LayerNormAct, r"layers of its own \(act\)")],
)
def test_a_norm_that_does_more_is_refused_and_nothing_changes(norm, why: str) -> None:
    model = nn.Sequential(nn.LayerNorm(D), norm())
    with pytest.raises(em.ConfigurationError, match=rf"1 \({norm.__name__}\) cannot be replaced.*{why}"):
        remove_layer_norms(model)
    assert isinstance(model[0], nn.LayerNorm)


class LayerNormGelu(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(super().forward(x))


class ResidualRMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class DroppedLayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.1, self.training)


class InverseRMSNorm(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x.square().mean(-1, keepdim=True).rsqrt()


class LayerNormLinear(nn.Module):
    def __init__(self, d: int, out: int = D) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d, out))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:]) @ self.weight


class LayerNormWider(LayerNormLinear):
    def __init__(self, d: int) -> None:
        super().__init__(d, D + 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (D,)) @ self.weight  # of D features only


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "norm", [LayerNormGelu, ResidualRMSNorm, DroppedLayerNorm, InverseRMSNorm, LayerNormLinear]
)
def test_a_norm_whose_code_does_more_is_refused_and_nothing_changes(norm, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.LayerNorm(D), norm(D)).to(dtype)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    with pytest.raises(em.ConfigurationError, match=rf"1 \({norm.__name__}\).*is not a scale and a shift"):
        remove_layer_norms(model)
    assert isinstance(model[0], nn.LayerNorm)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("make", [lambda: LayerNormWider(D), lambda: LayerNormWider(D).to("meta")])
def test_a_matrix_that_cannot_be_tried_is_refused(make) -> None:
    model = nn.ModuleList([make()])
    with pytest.raises(em.ConfigurationError, match=r"parameter weight of shape \[16, 19\] is no scale of"):
        remove_layer_norms(model)
    assert isinstance(model[0], LayerNormWider)


class CountingRMSNorm(nn.Module):
    def __init__(self, d: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.scale, self.eps, self.calls = nn.Parameter(torch.randn(d)), eps, 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        y = x.float() * (x.float().square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return ((1 + self.scale.float()) * y).to(x.dtype)


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class HeadsLayerNorm(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, d))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.layer_norm(x, x.shape[-1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "make",
    [
        CountingRMSNorm,
        lambda d: CountingRMSNorm(d, 1e-2),
        LayerNorm2d,
        HeadsLayerNorm,
        lambda d: type("MyLayerNorm", (nn.LayerNorm,), {"forward": lambda s, x: nn.LayerNorm.forward(s, x)})(
            (4, d)
        ),
    ],
)
def test_a_norm_that_is_written_by_hand_goes(make, dtype: torch.dtype) -> None:
    norm = make(D).to(dtype)
    if isinstance(norm, nn.LayerNorm):
        nn.init.normal_(norm.weight)
    state = torch.get_rng_state()
    model = remove_layer_norms(nn.ModuleList([norm]))
    assert removed_of(model) == ["0"]
    assert torch.equal(torch.get_rng_state(), state)
    if isinstance(norm, CountingRMSNorm):  # it was run, and nothing of that stayed
        assert (norm.calls, norm.seen.item()) == (0, 0)


def test_norms_without_values_are_judged_by_their_parameters() -> None:
    model = nn.ModuleList([CountingRMSNorm(D)]).to("meta")
    assert removed_of(remove_layer_norms(model)) == ["0"]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("layers", ["all", "layers.1.norm2"])
def test_torchs_encoder_in_eval_mode(padded: bool, layers: str) -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, 32, 0.0, batch_first=True), 2)
    remove_layer_norms(encoder, layers)
    x = torch.randn(2, 5, D)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    trained = encoder(x, src_key_padding_mask=mask)
    encoder.eval()
    with torch.no_grad():
        assert torch.allclose(encoder(x, src_key_padding_mask=mask), trained, atol=1e-6)


def test_a_whole_torch_transformer_runs() -> None:
    model = remove_layer_norms(nn.Transformer(D, 2, 1, 1, 32, batch_first=True)).eval()
    assert norms_of(model) == []
    with torch.no_grad():
        assert model(torch.randn(2, 5, D), torch.randn(2, 4, D)).shape == (2, 4, D)


@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_a_break(training: bool) -> None:
    model = remove_layer_norms(nn.TransformerEncoderLayer(D, 2, 32, 0.0, batch_first=True)).train(training)
    x = torch.randn(2, 5, D)
    torch._dynamo.reset()  # the cache of another test would have it recompile
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            assert torch.allclose(compiled(x), model(x), atol=1e-6)


def test_compiled_before_it_changes() -> None:
    model = Block()
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(2, 5, D)
    compiled(x)
    remove_layer_norms(compiled)
    assert torch.allclose(compiled(x), model(x), atol=1e-6)
    assert removed_of(model) == ["norm1", "norm2"]


def test_code_that_asks_a_norm_for_its_dtype_goes_on() -> None:
    model = remove_layer_norms(nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D)))
    assert model[0].weight.dtype is torch.float32
    model.to(torch.bfloat16)
    assert model[0].weight.dtype is torch.bfloat16
    assert model[0].weight.device.type == "cpu"
    with pytest.raises(TypeError):
        F.layer_norm(torch.randn(2, D), (D,), model[0].weight)


def test_copies_pickles_and_state_dicts() -> None:
    model = remove_layer_norms(Block())
    assert not [k for k in model.state_dict() if "norm" in k]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    x = torch.randn(2, 5, D)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), model(x))
    assert math.isnan(copy.deepcopy(model).norm1.eps)


def test_keeps_the_mode_and_is_shown() -> None:
    model = Block().eval()
    remove_layer_norms(model)
    assert not model.norm1.training
    assert "norm1): RemovedNorm(replaces LayerNorm)" in repr(model)


def test_attention_is_measured_without_norms() -> None:
    model = remove_layer_norms(nn.Sequential(Block(), Block()))
    assert len(em.measure(model, torch.randn(2, 5, D))) == 4


@pytest.mark.parametrize(
    ("model", "layers", "message"),
    [
        (nn.LayerNorm(4), "all", "the model is itself a norm"),
        (nn.Linear(4, 4), "all", "Linear has no nn.LayerNorm, nn.RMSNorm or class named like them"),
        (
            nn.Sequential(nn.LayerNorm(4)),
            "norm*",
            r"layers='norm\*' matches no layer norm of Sequential; it has 0",
        ),
        (nn.Sequential(nn.LayerNorm(4)), ["0", "1"], "layers='1' matches no layer norm"),
        (nn.Sequential(nn.LayerNorm(4)), lambda name, module: False, "matches no layer norm"),
        (
            nn.Sequential(nn.LayerNorm(4)),
            "attention",
            "layers='attention', and no module of Sequential looks like attention",
        ),
        (nn.Sequential(nn.LayerNorm(4)), 3, "layers must be 'all'"),
        (nn.Sequential(nn.LayerNorm(4)), [], "layers must be 'all'"),
        ("model", "all", "model must be a torch.nn.Module, got str"),
    ],
)
def test_wrong_input(model, layers, message: str) -> None:
    with pytest.raises(em.ConfigurationError, match=message):
        remove_layer_norms(model, layers)
    assert not isinstance(model, nn.Module) or removed_of(model) == []


def test_a_compiled_norm_alone_is_refused() -> None:
    with pytest.raises(em.ConfigurationError, match="itself a norm"):
        remove_layer_norms(torch.compile(nn.LayerNorm(4)))


def test_removing_twice_is_an_error() -> None:
    model = remove_layer_norms(Block())
    with pytest.raises(em.ConfigurationError, match="the layer norms of Block were removed before"):
        remove_layer_norms(model)
