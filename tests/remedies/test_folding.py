"""From reparametrized to plain and back: models, state dicts, files."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import entropy_monitor as em
from entropy_monitor.remedies.reparametrization.folding import scales_of
from tests.remedies.models import images, train_step, vit
from tests.remedies.test_reparametrization import MODELS, first_output


def trained(**options: Any) -> nn.Module:
    model = em.sigma_reparam(vit(), gamma="one", **options)
    optimizer = torch.optim.AdamW(em.param_groups(model, 1e-2))
    for _ in range(4):
        train_step(model, optimizer)
    return model


def test_folding_keeps_the_function_and_gives_the_original_keys() -> None:
    model, plain = trained(), vit()
    weights = [s.weight for _, s in scales_of(model)]
    y = model(images())
    assert em.fold(model) is model
    torch.testing.assert_close(model(images()), y, rtol=1e-6, atol=1e-9)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert [m.weight for m in model.modules() if isinstance(m, nn.Linear)] == weights  # the same parameters
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(images()), model(images()))


def test_folding_twice_and_folding_nothing_do_no_harm() -> None:
    model = em.fold(trained())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    em.fold(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_other_parametrizations_stay() -> None:
    model = nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)), nn.Linear(4, 4))
    em.sigma_reparam(model, "1", gamma="one")
    em.fold(model)
    assert hasattr(model[0], "parametrizations")
    assert not hasattr(model[1], "parametrizations")


@pytest.mark.parametrize("convert", ["sigma_reparam", "spectral_norm", "weight_norm"])
def test_a_state_dict_is_folded_without_the_model(convert: str) -> None:
    model = vit()
    em.sigma_reparam(model, gamma="one") if convert == "sigma_reparam" else getattr(em, convert)(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        train_step(model, optimizer)
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    folded = em.fold_state_dict(kept)
    plain = vit(seed=1)
    plain.load_state_dict(folded)
    torch.testing.assert_close(plain(images()), model(images()), rtol=1e-6, atol=1e-9)
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["gpt2", "neox", "encoder", "vit_with_patches"])
@pytest.mark.parametrize("fused", ["joint", "each"])
def test_state_dicts_of_all_forms_are_folded(name: str, fused: Any) -> None:
    model, inputs = MODELS[name]()
    plain, _ = MODELS[name]()
    em.sigma_reparam(model, gamma="one", fused=fused, example_inputs=inputs)
    with torch.no_grad():
        plain.load_state_dict(em.fold_state_dict(model.state_dict()))
        torch.testing.assert_close(first_output(plain(**inputs)), first_output(model(**inputs)))


def test_plain_state_dicts_are_folded_to_themselves() -> None:
    plain = vit().state_dict()
    assert em.fold_state_dict(plain) == plain


@pytest.mark.parametrize("name", ["gpt2", "encoder", "vit_with_patches"])
@pytest.mark.parametrize("fused", ["joint", "each"])
def test_a_plain_state_dict_is_loaded_as_it_computes(name: str, fused: Any) -> None:
    model, inputs = MODELS[name]()
    source, _ = MODELS[name]()
    with torch.no_grad():
        for p in source.parameters():
            p.mul_(1.5)
        em.sigma_reparam(model, gamma="one", fused=fused, example_inputs=inputs)
        given = source.state_dict()
        keys = list(given)
        assert not any(model.load_state_dict(given))
        assert list(given) == keys
        torch.testing.assert_close(
            first_output(model(**inputs)), first_output(source(**inputs)), rtol=1e-5, atol=1e-6
        )


def test_a_plain_weight_of_another_shape_is_refused_by_torch() -> None:
    model = em.sigma_reparam(nn.Linear(4, 4), gamma="one")
    with pytest.raises(RuntimeError, match=r"size mismatch for parametrizations\.weight\.original"):
        model.load_state_dict(nn.Linear(4, 5).state_dict())


def test_loading_by_assignment() -> None:
    model, other = trained(), vit(seed=3)
    em.sigma_reparam(other, gamma="one")
    other.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    torch.testing.assert_close(other(images()), model(images()))
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    before = [s.u.clone() for _, s in scales_of(other)]
    train_step(other, optimizer)
    assert any(not torch.equal(s.u, u) for (_, s), u in zip(scales_of(other), before, strict=True))


def test_state_dicts_are_pickled_and_stored_as_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file, save_model

    model = trained()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=True)
    assert all(torch.equal(v, again[k]) for k, v in model.state_dict().items())
    assert list(pickle.loads(pickle.dumps(model.state_dict()))) == list(model.state_dict())
    save_file(model.state_dict(), tmp_path / "converted.safetensors")
    plain = vit(seed=1)
    plain.load_state_dict(em.fold_state_dict(load_file(tmp_path / "converted.safetensors")))
    torch.testing.assert_close(plain(images()), model(images()), rtol=1e-6, atol=1e-9)
    gpt2, _ = MODELS["gpt2"]()
    em.fold(em.sigma_reparam(gpt2, gamma="one"))
    save_model(gpt2, str(tmp_path / "folded.safetensors"))  # refuses weights that are no contiguous tensors


def test_code_that_never_heard_of_this_package_loads_what_is_folded(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    em.sigma_reparam(model, gamma="one")
    x = torch.ones(1, 4)
    torch.save({"y": model(x).detach(), "model": em.fold(model)}, tmp_path / "model.pt")
    script = (
        "import torch, sys\n"
        f"kept = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "assert torch.allclose(kept['model'](torch.ones(1, 4)), kept['y'], rtol=1e-6)\n"
        "assert not [name for name in sys.modules if name.startswith('entropy_monitor')]\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_weight_norms_of_the_models_own_stay() -> None:
    own = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    model = nn.Sequential(own, nn.Linear(4, 4))
    keys = list(model.state_dict())
    em.sigma_reparam(model, "1", gamma="preserve")
    em.fold(model)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize(
    "layer", [nn.Linear(5, 1), nn.Linear(1, 5), nn.Conv1d(3, 1, 2), nn.Conv2d(1, 1, 1)], ids=str
)
def test_weight_norm_of_narrow_layers_is_folded(layer: nn.Module) -> None:
    model = nn.Sequential(layer)
    weight = layer.weight.detach().clone()
    em.weight_norm(model)
    torch.testing.assert_close(em.fold_state_dict(model.state_dict())["0.weight"], weight)


def test_a_model_within_ddp_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = em.sigma_reparam(nn.Sequential(nn.Linear(4, 4)), gamma="preserve")
    monkeypatch.setattr(
        "entropy_monitor.remedies.reparametrization.folding.DistributedDataParallel", nn.Sequential
    )
    with pytest.raises(em.ConfigurationError, match=r"em\.fold\(model\.module\)"):
        em.fold(model)
    assert len(list(scales_of(model))) == 1
