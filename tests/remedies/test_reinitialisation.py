from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn.utils import parametrizations

import entropy_monitor as em
from entropy_monitor.remedies.reinitialisation import reinitialise


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(8, 16), nn.LayerNorm(16), nn.Conv1d(1, 4, 3), nn.Sequential(nn.Linear(16, 8))
    )


def test_draws_what_a_loop_over_the_layers_would() -> None:
    model = net()
    expected = copy.deepcopy(model)
    torch.manual_seed(3)
    for layer in expected.modules():
        if isinstance(layer, (nn.Linear, nn.Conv1d)):
            nn.init.trunc_normal_(layer.weight, std=0.02)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert reinitialise(model) is model
    assert torch.equal(torch.rand(1), after)
    for (name, a), b in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_generator_leaves_the_global_one_alone() -> None:
    one, other = net(), net()
    state = torch.get_rng_state()
    reinitialise(one, generator=torch.Generator().manual_seed(1))
    reinitialise(other, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one[0].weight, other[0].weight)


@pytest.mark.parametrize("std", [0.02, 0.5, 1])
def test_the_distribution(std: float) -> None:
    model = reinitialise(nn.Linear(400, 400), std=std, generator=torch.Generator().manual_seed(0))
    weight = model.weight.detach().double()
    exact = nn.init.trunc_normal_(torch.empty(400, 400, dtype=torch.float64), std=std).std()
    assert weight.abs().max() <= 2
    assert abs(weight.std() - exact) < 0.01 * exact
    assert abs(weight.mean()) < 4 * std / 400


def test_biases_norms_embeddings_and_parameters_stay() -> None:
    model = hf.BertModel(
        hf.BertConfig(
            hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32, vocab_size=32
        )
    )
    for p in model.parameters():
        nn.init.uniform_(p, 3, 4)
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    reinitialise(model)
    layers = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, p in model.named_parameters():
        owner, kind = name.rsplit(".", 1)
        assert p is before[name][0]
        if owner in layers and kind == "weight":
            assert p.abs().max() < 0.2, name
        else:
            assert torch.equal(p, before[name][1]), name


def test_every_kind_of_linear_layer() -> None:
    gpt = hf.GPT2Model(hf.GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=32))
    model = nn.ModuleList(
        [gpt.h[0].attn, nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2, kdim=4), nn.Conv2d(3, 4, 2)]
    )
    weights = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    for p in weights.values():
        nn.init.constant_(p, 1.0)
    reinitialise(model)
    assert len(weights) == 9
    for name, p in weights.items():
        assert 0.01 < p.std() < 0.03, name


def test_chosen_layers_only() -> None:
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    reinitialise(model, "3.*")
    changed = [not torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True)]
    assert [n for (n, _), c in zip(model.named_parameters(), changed, strict=True) if c] == ["3.0.weight"]


def test_frozen_weights_are_left_alone_and_cost_no_numbers() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    model[0].requires_grad_(False)
    model[1].in_proj_weight.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    expected = [torch.empty(8, 8), torch.empty(8, 8)]
    torch.manual_seed(3)
    for weight in expected:
        nn.init.trunc_normal_(weight, std=0.02)
    torch.manual_seed(3)
    reinitialise(model)
    drawn = {n: p for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert list(drawn) == ["1.out_proj.weight", "2.weight"]
    assert all(torch.equal(p, want) for p, want in zip(drawn.values(), expected, strict=True))


def test_nothing_but_frozen_weights_is_an_error() -> None:
    model = net()
    model[0].requires_grad_(False)
    state = torch.get_rng_state()
    with pytest.raises(em.ConfigurationError, match=r"are frozen \(0\.weight\).*call requires_grad_\(True\)"):
        reinitialise(model, "0")
    assert torch.equal(torch.get_rng_state(), state)


def test_the_recipe_in_its_order() -> None:
    from entropy_monitor.remedies.layer_norms import remove_layer_norms
    from entropy_monitor.remedies.reparametrization.convert import sigma_reparam

    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    sigma_reparam(reinitialise(remove_layer_norms(model)), gamma="one")
    assert torch.linalg.matrix_norm(model[0].weight, 2).item() == pytest.approx(1, abs=1e-5)


def test_after_reparametrization_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), parametrizations.weight_norm(nn.Linear(4, 4)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(
        em.ConfigurationError, match=r"1.weight is parametrized.*Re-initialise first, then reparametrize"
    ):
        reinitialise(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"std": 0}, "std must be a positive number, such as 0.02, got 0"),
        ({"std": -0.1}, "got -0.1"),
        ({"std": float("nan")}, "got nan"),
        ({"std": float("inf")}, "got inf"),
        ({"std": True}, "got True"),
        ({"std": "0.02"}, "got '0.02'"),
        ({"generator": 3}, "generator must be a torch.Generator or None, got int"),
        ({"layers": "x.*"}, r"layers='x.\*' matches no"),
    ],
)
def test_wrong_input(arguments, message: str) -> None:
    model = net()
    before = model[0].weight.detach().clone()
    state = torch.get_rng_state()
    with pytest.raises(em.ConfigurationError, match=message):
        reinitialise(model, **arguments)
    assert torch.equal(model[0].weight, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_module_and_no_values() -> None:
    with pytest.raises(em.ConfigurationError, match=r"must be a torch.nn.Module, got list"):
        reinitialise([])
    with pytest.raises(em.ConfigurationError, match="meta device"):
        reinitialise(nn.Linear(4, 4, device="meta"))
