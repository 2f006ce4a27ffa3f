from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.remedies.scale_invariance.attention import scale_invariant_attention
from entropy_monitor.remedies.scale_invariance.homogeneity import probe_homogeneity
from entropy_monitor.remedies.scale_invariance.report import Homogeneity

WIDTH, T, WORDS = 8, 5, 7


def linear(n: int = WIDTH, m: int = WIDTH, bias: bool = False) -> nn.Linear:
    return nn.Linear(n, m, bias=bias)


def mlp(depth: int, act: Callable[[], nn.Module] = nn.ReLU, bias: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [linear(bias=bias), act()]
    return nn.Sequential(*layers[:-1]).double()


def batch() -> Tensor:
    return torch.randn(3, T, WIDTH, dtype=torch.float64)


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-20)


def probed(model: nn.Module, **options: Any) -> Homogeneity:
    x = batch()
    return probe_homogeneity(model, lambda m: m(x), **options)


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("scales", [(0.5, 2.0), (0.3, 1.7, 11.0)])
def test_the_degree_of_a_network_of_relus_is_its_depth(depth: int, scales: tuple[float, ...]) -> None:
    found = probed(mlp(depth), scales=scales)
    assert found.homogeneous
    assert found.degree == pytest.approx(depth, abs=1e-12)
    assert found.residual < 1e-13
    assert found.breaks == ()
    assert [(g.name, g.parameters) for g in found.groups] == [(str(2 * i), WIDTH**2) for i in range(depth)]
    assert [g.degree for g in found.groups] == pytest.approx([1.0] * depth, abs=1e-12)
    assert all(g.homogeneous for g in found.groups)
    outputs = {m.module: m.degree for m in found.modules}
    assert [outputs[str(2 * i)] for i in range(depth)] == pytest.approx(list(range(1, depth + 1)), abs=1e-12)


def test_degrees_that_are_no_whole_numbers_and_negative_ones() -> None:
    class Root(nn.Module):
        def __init__(self, power: float) -> None:
            super().__init__()
            self.w, self.power = nn.Parameter(torch.rand(4, dtype=torch.float64) + 1), power

        def forward(self, x: Tensor) -> Tensor:
            return (self.w**self.power).sum() + 0 * x.sum()

    for power in (0.5, -1.0, -2.0, 3.5):
        found = probed(Root(power))
        assert found.homogeneous
        assert found.degree == pytest.approx(power, abs=1e-12)


def test_norms_make_it_scale_invariant_and_say_so() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp(2)

        def forward(self, x: Tensor) -> Tensor:
            return norm(self.inner(x))

    found = probed(Normed())
    assert found.degree == pytest.approx(0, abs=1e-10)
    assert found.homogeneous
    assert str(found).startswith("homogeneous of degree 0: scale-invariant; residual ")


class Attention(nn.Module):
    def __init__(self, weigh: Callable[..., Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (linear() for _ in range(4))
        self.weigh = weigh

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.weigh(self.q(x) @ self.k(x).mT, dim=-1) @ self.v(x))


class Block(nn.Module):
    """A residual stream of degree 0; `inside` and `after` norm the branch, where they are asked to."""

    def __init__(
        self, weigh: Callable[..., Tensor], after: bool, bias: bool = False, act: Any = nn.ReLU
    ) -> None:
        super().__init__()
        self.attention = Attention(weigh)
        self.mlp = nn.Sequential(linear(bias=bias), act(), linear())
        self.pre = nn.LayerNorm(WIDTH, eps=1e-20, elementwise_affine=False)
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        x = norm(x)
        a = self.attention(x)
        x = x + (norm(a) if self.after else a)
        m = self.mlp(self.pre(x))
        return x + norm(m)


@pytest.mark.parametrize(
    ("block", "breaks"),
    [
        (lambda: Block(scale_invariant_attention, True), []),
        (lambda: Block(F.softmax, True), ["attention"]),
        (lambda: Block(scale_invariant_attention, False), ["Block"]),
        (lambda: Block(scale_invariant_attention, True, bias=True), []),  # its input has degree 0
        (lambda: Block(scale_invariant_attention, True, act=nn.GELU), ["mlp.1"]),
        (lambda: Block(F.softmax, False, act=nn.Tanh), ["attention", "Block", "mlp.1"]),
    ],
    ids=["sound", "softmax", "branch of another degree", "bias", "gelu", "all"],
)
def test_the_part_that_breaks_it_is_named_and_no_other(block: Callable[[], Block], breaks: list[str]) -> None:
    found = probed(block().double())
    assert [b.module for b in found.breaks] == breaks
    assert found.homogeneous == (not breaks)
    if not breaks:
        assert found.residual < 1e-11
    else:
        assert found.residual > 1e-2
        assert "parts that break it:" in str(found)
        assert all(f"  {name} (" in str(found) for name in breaks)


def test_which_degrees_meet_in_a_residual_stream() -> None:
    (found,) = probed(Block(scale_invariant_attention, False).double()).breaks
    assert found.kind == "Block"
    assert found.where == "what it gives to pre"
    assert dict(found.meets)["attention"] == pytest.approx(2, abs=1e-9)
    assert dict(found.meets)["input"] == 0
    assert "degrees that differ meet in its forward (input: 0, attention: 2)" in found.why


def test_attention_with_a_softmax_is_told_the_way_out() -> None:
    (found,) = probed(Block(F.softmax, True).double()).breaks
    assert found.where == "what it gives to attention.out"
    assert "softmax" in found.why
    assert "scale_invariant_attention" in found.why


def test_a_bias_is_named_with_the_degrees_that_meet() -> None:
    model = nn.Sequential(linear(), linear(bias=True)).double()
    (found,) = probed(model).breaks
    assert (found.module, found.kind, found.where) == ("1", "Linear", "what it returns")
    assert found.why == "its bias (degree 1) is added to what its weight makes of its input (degree 2)"


def test_biases_that_are_zero_still_are_named() -> None:
    model = nn.Sequential(linear(), linear(bias=True)).double()
    nn.init.zeros_(model[1].bias)
    found = probed(model)
    assert found.homogeneous
    assert found.zeros == ("1.bias",)
    assert "all 0, so that what they break does not show yet: 1.bias" in str(found)


def test_an_eps_that_is_felt() -> None:
    model = nn.Sequential(linear(), nn.LayerNorm(WIDTH, eps=0.1)).double()
    (found,) = probed(model).breaks
    assert found.module == "1"
    assert "eps" in found.why


def test_the_loss_itself() -> None:
    model, x, target = mlp(2), batch()[0], torch.arange(T)
    # Logits far from 0: near it the loss is that of equal logits at any scale.
    found = probe_homogeneity(model, lambda m: F.cross_entropy(10 * m(x), target))
    assert [b.module for b in found.breaks] == ["loss_fn"]
    assert "Sequential: 2" in found.breaks[0].why
    assert probe_homogeneity(model, lambda m: m(x).square().mean()).degree == pytest.approx(4, abs=1e-12)


def test_a_loss_of_one_number_is_found_out_by_the_second_scale() -> None:
    model, x = mlp(1), batch()
    found = probe_homogeneity(model, lambda m: m(x).norm() + 1)
    assert not found.homogeneous


def test_groups() -> None:
    model = mlp(3)
    found = probed(model, groups={"ends": ["0.weight", model[4].weight], "middle": "2", "all": "*"})
    assert {g.name: (round(g.degree, 9), g.parameters) for g in found.groups} == {
        "ends": (2, 128),
        "middle": (1, 64),
        "all": (3, 192),
    }
    assert probed(model, groups={}).groups == ()


def test_tied_weights_are_scaled_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(WORDS, WIDTH), linear(WIDTH, WORDS)
            self.head.weight = self.embed.weight

        def forward(self, i: Tensor) -> Tensor:
            return self.head(self.embed(i))

    words = torch.randint(0, WORDS, (2, T))
    found = probe_homogeneity(Tied().double(), lambda m: m(words))
    assert found.degree == pytest.approx(2, abs=1e-12)
    assert [(g.name, round(g.degree, 9)) for g in found.groups] == [("embed", 2)]


def test_a_module_that_is_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp(2, bias=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(norm(self.inner(norm(x))))

    found = probed(Twice())
    assert [m.call for m in found.modules if m.module == "inner.0"] == [0, 1]
    assert [b.module for b in found.breaks] == ["inner.2"]  # inner.0 adds its bias to degree 1, both times


def test_frozen_parameters_are_held() -> None:
    model = mlp(3)
    model[2].weight.requires_grad_(False)
    found = probed(model)
    assert found.degree == pytest.approx(2, abs=1e-12)
    assert found.frozen == ("2.weight",)
    assert [g.name for g in found.groups] == ["0", "4"]
    assert "not trained, and not scaled: 1" in str(found)
    (held,) = probed(model, groups={"held": "2.weight"}).groups
    assert held.degree == pytest.approx(1, abs=1e-12)
    assert probed(model.requires_grad_(False)).degree == pytest.approx(3, abs=1e-12)


def test_outputs_of_zeros_have_every_degree() -> None:
    model = mlp(1)
    nn.init.zeros_(model[0].weight)
    found = probed(model)
    assert math.isnan(found.degree)
    assert found.residual == 0
    assert "degree any" in str(found)


def test_infinities_that_stay_are_left_out() -> None:
    model, x = mlp(2), batch()
    hide = torch.zeros(T, WIDTH).masked_fill(torch.rand(T, WIDTH) < 0.5, -math.inf)
    found = probe_homogeneity(model, lambda m: m(x) + hide)
    assert found.degree == pytest.approx(2, abs=1e-12)
    assert found.homogeneous
    overflows = nn.Sequential(linear(), linear()).half()
    found = probe_homogeneity(overflows, lambda m: m(torch.ones(1, WIDTH).half()), scales=(0.5, 4096.0))
    assert not found.homogeneous
    assert found.residual == math.inf


def test_integers_within_a_model() -> None:
    class Choice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x > 0.5).long().argmax(-1)

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.choice, self.experts = linear(), Choice(), nn.Embedding(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.experts(self.choice(self.gate(x)))

    found = probed(Routed().double())
    assert [b.module for b in found.breaks] == ["choice"]


class Busy(nn.Module):
    """Moves all that a forward may move."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.batch_norm, self.drop, self.last = (
            linear(),
            nn.BatchNorm1d(T),
            nn.Dropout(0.5),
            linear(),
        )
        self.register_buffer("count", torch.zeros(()))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count += 1
        x = x * (0.5 + random.random()) * (0.5 + np.random.rand())  # noqa: NPY002
        return self.last(self.drop(self.batch_norm(self.first(x))))


def test_nothing_of_it_stays() -> None:
    model = Busy().double().train()
    model.last.eval()
    model.first.weight.grad = torch.ones(WIDTH, WIDTH, dtype=torch.float64)
    x = batch()
    live = (model.first.weight**2).sum()  # a graph of the user's, over the values as they are
    torch.manual_seed(3), random.seed(3), np.random.seed(3)  # noqa: NPY002
    want = torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
    torch.manual_seed(3), random.seed(3), np.random.seed(3)  # noqa: NPY002
    before, hooks = copy.deepcopy(model.state_dict()), [len(m._forward_hooks) for m in model.modules()]
    pointers, versions = ([f(p) for p in model.parameters()] for f in (Tensor.data_ptr, lambda p: p._version))
    found = probe_homogeneity(model, lambda m: m(x), scales=(0.3, 1.7))
    assert (
        found.homogeneous
    )  # the batch norm's eps is felt a little; its draws and buffers are the same each time
    assert found.degree == pytest.approx(2, abs=1e-2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert (model.calls, model.training, model.last.training) == (0, True, False)
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert [p._version for p in model.parameters()] == versions
    assert torch.equal(model.first.weight.grad, torch.ones(WIDTH, WIDTH))
    got = torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
    assert torch.equal(got[0], want[0])
    assert got[1:] == want[1:]
    live.backward()
    assert torch.is_grad_enabled()


def test_random_draws_are_the_same_each_time() -> None:
    model = nn.Sequential(linear(), nn.Dropout(0.5), linear()).double().train()
    found = probed(model)
    assert found.homogeneous
    assert found.degree == pytest.approx(2, abs=1e-12)


def test_parameters_come_back_when_it_raises() -> None:
    model, calls = mlp(2), []
    before = copy.deepcopy(model.state_dict())

    def fails(m: nn.Module) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyError("the user's own")
        return m(torch.ones(1, WIDTH, dtype=torch.float64))

    with pytest.raises(KeyError, match="the user's own"):
        probe_homogeneity(model, fails)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_compiled_models_and_low_precision() -> None:
    model = mlp(2)
    x = batch()
    compiled: Any = torch.compile(model, backend="eager")
    assert probe_homogeneity(compiled, lambda m: m(x)).degree == pytest.approx(2, abs=1e-12)
    low = mlp(3).bfloat16()
    found = probe_homogeneity(low, lambda m: m(x.bfloat16()))
    assert found.degree == pytest.approx(3, abs=1e-12)  # powers of two scale without rounding
    assert found.residual < 1e-14


def test_under_one_autocast_around_all_of_it() -> None:
    model, x = mlp(2).float(), batch().float()
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
        found = probe_homogeneity(model, lambda m: m(x))
        out = model(x)
    assert found.degree == pytest.approx(2, abs=1e-12)
    assert found.residual < 1e-14
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), out)


def test_a_model_that_catches_what_a_part_raises() -> None:
    class Part(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError

    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.rest = Part(), linear(bias=True)

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.part(x)
            except ValueError:
                return self.rest(self.rest(x))

    (found,) = probed(Careful().double()).breaks
    assert found.module == "rest"


@pytest.mark.parametrize("norm_first", [True, False])
def test_the_transformer_of_torch(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    found = probed(model)
    assert not found.homogeneous
    names = [b.module for b in found.breaks]
    assert names[0] == "layers.0.self_attn"
    assert {"layers.0", "layers.0.linear2", "layers.1.self_attn", "layers.1", "layers.1.linear2"} <= set(
        names
    )
    assert not any("norm" in name or "dropout" in name for name in names)


def test_models_of_hugging_face() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=30,
        initializer_range=0.5,
    )  # fmt: skip
    model, words = (
        transformers.BertModel(config, add_pooling_layer=False).eval(),
        torch.randint(0, 30, (2, 6)),
    )
    found = probe_homogeneity(model, lambda m: m(words).last_hidden_state)
    kinds = [b.kind for b in found.breaks]
    assert kinds == ["BertSelfAttention", "BertSelfOutput", "GELUActivation", "BertOutput"]
    assert "encoder.layer.0.attention.self.query.bias" in found.zeros


ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "one scale": (lambda: probed(mlp(1), scales=(2.0,)), "at least two different positive numbers"),
    "scale 1": (lambda: probed(mlp(1), scales=(1.0, 2.0)), r"other than 1, got \(1.0, 2.0\)"),
    "scale 0": (lambda: probed(mlp(1), scales=(0.0, 2.0)), "positive"),
    "rtol": (lambda: probed(mlp(1), rtol=0.0), "rtol must be a number above 0, got 0"),
    "rtol text": (lambda: probed(mlp(1), rtol="x"), "rtol must be a number above 0, got 'x'"),
    "one number": (lambda: probed(mlp(1), scales=2.0), r"at least two different .*, got 2\.0"),
    "texts": (lambda: probed(mlp(1), scales=("a", "b")), r"positive numbers .*, got \('a', 'b'\)"),
    "a text": (lambda: probed(mlp(1), scales="23"), "positive numbers .*, got '23'"),
    "model": (lambda: probe_homogeneity(3, lambda m: m), "model must be a torch.nn.Module, got int"),
    "loss_fn": (lambda: probe_homogeneity(mlp(1), 3), "loss_fn must be a function of the model.*, got 3"),
    "groups": (lambda: probed(mlp(1), groups=["0"]), "groups must be a dict .*, or None, got list"),
    "members": (lambda: probed(mlp(1), groups={"a": 3}), "group 'a' must hold parameters .*, got 3"),
    "member": (lambda: probed(mlp(1), groups={"a": [None]}), "group 'a' must hold parameters .*, got None"),
    "no parameters": (lambda: probed(nn.ReLU()), "ReLU has no floating parameter"),
    "lazy": (lambda: probed(nn.LazyLinear(2)), "weight has no shape yet"),
    "meta": (lambda: probed(nn.Linear(2, 2, device="meta")), "weight is on the meta device"),
    "no tensor": (lambda: probe_homogeneity(mlp(1), lambda m: (1, 2)), "must return a tensor, got tuple"),
    "integers": (lambda: probe_homogeneity(mlp(1), lambda m: m(batch()).argmax()), r"returned torch\.int64"),
    "nan": (lambda: probe_homogeneity(mlp(1), lambda m: m(batch()) * math.nan), "NaN in 120 of 120 values"),
    "nothing": (lambda: probe_homogeneity(mlp(1), lambda m: m(batch()[:0])), "gave nothing"),
    "pattern": (
        lambda: probed(mlp(1), groups={"a": "b.*"}),
        "'b.*' matches no parameter; there are 0.weight",
    ),
    "stranger": (lambda: probed(mlp(1), groups={"a": nn.Parameter(torch.ones(2))}), "none of the model's"),
    "empty": (lambda: probed(mlp(1), groups={"a": []}), "group 'a' is empty"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    call, message = ERRORS[case]
    with pytest.raises(ConfigurationError, match=message):
        call()


def test_a_loss_that_takes_another_batch_each_time() -> None:
    loader = iter([batch() for _ in range(20)])
    with pytest.raises(ConfigurationError, match="something else the second time"):
        probe_homogeneity(mlp(1), lambda m: m(next(loader)))
