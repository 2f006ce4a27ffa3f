from __future__ import annotations

import logging

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import entropy_monitor as em
from entropy_monitor.demo.vit import VisionTransformer
from entropy_monitor.remedies.patch_embedding import freeze_patch_embedding

S = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
V = {**S, "image_size": 8, "patch_size": 4}


class PatchEmbed(nn.Module):
    """As in timm and its many descendants."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16)


class ClipStem(nn.Module):
    """As in OpenAI's CLIP: the patches are cut by `conv1`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 4, 4, bias=False)
        self.transformer = nn.TransformerEncoderLayer(16, 2)


def timm_like() -> nn.Module:
    return nn.ModuleDict({"patch_embed": PatchEmbed(), "blocks": nn.TransformerEncoderLayer(16, 2)})


def lucidrains() -> nn.Module:
    stem = nn.Sequential(nn.Flatten(), nn.LayerNorm(48), nn.Linear(48, 16), nn.LayerNorm(16))
    return nn.ModuleDict({"to_patch_embedding": stem, "mlp": nn.Linear(16, 16)})


def by_class() -> nn.Module:
    return nn.ModuleDict({"stem": PatchEmbed(), "mlp": nn.Linear(16, 16)})


def torchvision_like() -> nn.Module:
    """As in torchvision's VisionTransformer."""
    return nn.ModuleDict({"conv_proj": nn.Conv2d(3, 16, 4, 4), "encoder": nn.TransformerEncoderLayer(16, 2)})


FOUND = [
    (timm_like, "patch_embed.proj"),
    (lucidrains, "to_patch_embedding.2"),
    (by_class, "stem.proj"),
    (ClipStem, "conv1"),
    (lambda: VisionTransformer(16, 4, 10), "embed"),
    (lambda: hf.ViTModel(hf.ViTConfig(**V)), "embeddings.patch_embeddings.projection"),
    (
        lambda: hf.ViTForMaskedImageModeling(hf.ViTConfig(**V, encoder_stride=4)),
        "vit.embeddings.patch_embeddings.projection",
    ),
    (lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**V)), "patch_embedding"),
    (
        lambda: hf.CLIPModel(
            hf.CLIPConfig(text_config={**S, "vocab_size": 50}, vision_config=V, projection_dim=8)
        ),
        "patch_embedding",
    ),
    (lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**V)), "patch_embedding"),
    (lambda: hf.Dinov2Model(hf.Dinov2Config(**V)), "embeddings.patch_embeddings.projection"),
    (
        lambda: hf.SwinModel(
            hf.SwinConfig(
                image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4
            )
        ),
        "embeddings.patch_embeddings.projection",
    ),
    (
        lambda: hf.VideoMAEModel(hf.VideoMAEConfig(**V, num_frames=2)),
        "embeddings.patch_embeddings.projection",
    ),
    (torchvision_like, "conv_proj"),
]


def frozen(model: nn.Module) -> list[str]:
    return [n for n, p in model.named_parameters() if not p.requires_grad]


@pytest.mark.parametrize(("make", "name"), FOUND)
def test_finds_the_patch_embedding(make, name: str, caplog) -> None:
    model = make()
    before = set(frozen(model))
    with caplog.at_level(logging.INFO, logger="entropy_monitor"):
        assert freeze_patch_embedding(model) is model
    (label,) = {n.rsplit(".", 1)[0] for n in set(frozen(model)) - before}
    assert label == name or label.endswith(f".{name}")
    assert f"froze the patch embedding {label}" in caplog.text


def test_an_optimizer_leaves_it_alone_even_in_the_middle_of_a_run() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(16, 4, 10)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.5)
    x = torch.randn(2, 16, 4)

    def step() -> None:
        model(x).square().sum().backward()
        optimizer.step()

    step()
    freeze_patch_embedding(model)
    held = [p.detach().clone() for p in model.embed.parameters()]
    others = model.classify.weight.detach().clone()
    step()
    step()
    assert all(torch.equal(a, b) for a, b in zip(model.embed.parameters(), held, strict=True))
    assert not torch.equal(model.classify.weight, others)


def test_a_parametrized_one_is_frozen_with_its_parametrization() -> None:
    model = timm_like()
    parametrizations.weight_norm(model["patch_embed"].proj)
    freeze_patch_embedding(model)
    assert {n.rsplit(".", 1)[-1] for n in frozen(model)} == {"bias", "original0", "original1"}


def pyramid() -> nn.Module:
    return nn.ModuleDict({f"patch_embed{i}": PatchEmbed() for i in (1, 2)})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("patch_embed1", ["patch_embed1.proj.weight", "patch_embed1.proj.bias"]),
        ("patch_embed2.proj", ["patch_embed2.proj.weight", "patch_embed2.proj.bias"]),
        ("*1.proj", ["patch_embed1.proj.weight", "patch_embed1.proj.bias"]),
        ("patch_embed?", [f"patch_embed{i}.proj.{t}" for i in (1, 2) for t in ("weight", "bias")]),
    ],
)
def test_named_by_the_user(name: str, expected: list[str]) -> None:
    model = pyramid()
    freeze_patch_embedding(model, name)
    assert frozen(model) == expected


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed, self.decode = nn.Linear(8, 8), nn.Linear(8, 8)
        self.decode.weight = self.patch_embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.patch_embed(x))


def already() -> nn.Module:
    return freeze_patch_embedding(timm_like())


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (
            pyramid,
            None,
            "2 layers that may be .*: patch_embed1.proj, patch_embed2.proj; say.*: name='patch_embed1.proj'",
        ),
        (
            lambda: nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)),
            None,
            r"no layer of Sequential looks like a patch embedding.*: 0, 1\)",
        ),
        (
            lambda: hf.GPT2Model(hf.GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=9)),
            None,
            "no layer of GPT2Model looks like",
        ),
        (lambda: hf.ResNetModel(hf.ResNetConfig()), None, "no layer of ResNetModel looks like"),
        (timm_like, "patch_embd", "name='patch_embd' matches no module of ModuleDict; it has patch_embed"),
        (timm_like, "patch_embed.norm", "patch_embed.norm of ModuleDict is no linear layer"),
        (timm_like, "", "name must be"),
        (timm_like, 3, "name must be .* got 3"),
        (already, None, "patch_embed.proj is frozen already"),
        (Tied, None, "weight of patch_embed is also decode.weight"),
        (lambda: "vit", None, "must be a torch.nn.Module, got str"),
        (lambda: nn.ModuleDict({"patch_embed": nn.LazyLinear(4)}), None, "lazy layer"),
    ],
)
def test_wrong_input(make, name, message: str) -> None:
    model = make()
    before = frozen(model) if isinstance(model, nn.Module) else None
    with pytest.raises(em.ConfigurationError, match=message):
        freeze_patch_embedding(model, name)
    assert before is None or frozen(model) == before
