"""`measure` and `capture`: what they return, keep and put back, and what they say when it goes wrong."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import entropy_monitor as em
from entropy_monitor.hooks.calls import AttentionCall
from tests.hooks.test_zoo import built
from tests.zoo import ZOO, figures
from tests.zoo.decoders import NanoGPT


@pytest.mark.parametrize("name", ZOO)
def test_maps_equal_the_dense_ones(name: str) -> None:
    model, inputs = built(ZOO[name])
    with torch.random.fork_rng(), em.capture(model, maps=True) as seen:
        model(*inputs)
    for dense in ZOO[name].dense(model, *inputs):
        blind = (dense.logits == -torch.inf).all(-1, keepdim=True)
        want = dense.logits.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
        torch.testing.assert_close(
            seen.maps[dense.layer][dense.call].double(), want, rtol=0, atol=2e-5, check_stride=False
        )


@pytest.mark.parametrize("name", ["nanogpt-sdpa", "nanogpt-masked_fill", "mha-both-False", "hand-fairseq"])
def test_some_rows_are_the_mean_of_those_rows(name: str) -> None:
    from entropy_monitor.measures import stratified_rows

    model, inputs = built(ZOO[name])
    table = em.measure(model, *inputs, rows=4)
    expected = ZOO[name].dense(model, *inputs)
    rows = stratified_rows(expected[0].logits.shape[2], 4, 0)
    for dense, (_, part) in zip(expected, table.groupby(["layer", "call"], sort=False), strict=True):
        for field in ("logits", "q"):
            setattr(dense, field, getattr(dense, field)[:, :, rows])
        dense.x_q = dense.x_q[:, rows]
        for column, want in figures(dense).items():
            assert part[column].tolist() == pytest.approx(want.tolist(), abs=2e-5), column
        assert (part.entropy_se > 0).all()


def test_several_forwards_are_averaged_by_rows() -> None:
    model = NanoGPT(True)
    first, second = torch.randint(50, (3, 11)), torch.randint(50, (1, 5))
    with em.capture(model) as seen:
        model(first)
        model(second)
    a, b = em.measure(model, first), em.measure(model, second)
    for column in ("entropy", "max_entropy", "floor_row", "floor_activation"):
        want = (a[column] * a.rows_read + b[column] * b.rows_read) / (a.rows_read + b.rows_read)
        assert seen.heads[column].tolist() == pytest.approx(want.tolist(), abs=1e-6)
    assert seen.heads.max_logit.tolist() == a.max_logit.combine(b.max_logit, max).tolist()


def test_floors_lie_below_the_entropy() -> None:
    for name, entry in ZOO.items():
        model, inputs = built(entry)
        table = em.measure(model, *inputs)
        for column in ("floor_row", "floor_activation", "floor_weights"):
            assert not (table[column] > table.entropy + 1e-4).any(), (name, column)


def test_chosen_maps() -> None:
    model, x = NanoGPT(True), torch.randint(50, (2, 7))
    with em.capture(model, maps={"h.1.*": [2]}) as seen:
        model(x)
        model(x)
    assert {layer: [m.shape for m in maps] for layer, maps in seen.maps.items()} == {
        "h.1.attn": [(2, 1, 7, 7)]
    }


def test_all_heads_of_a_chosen_layer() -> None:
    model, x = NanoGPT(True), torch.randint(50, (2, 7))
    with em.capture(model, maps={"h.1.attn": "all", "h.0.attn": np.arange(2)}) as seen:
        model(x)
    heads = len(seen.heads[seen.heads.layer == "h.1.attn"])
    assert {layer: maps[0].shape[1] for layer, maps in seen.maps.items()} == {
        "h.0.attn": 2,
        "h.1.attn": heads,
    }


def test_heads_that_a_layer_lacks() -> None:
    model, x = NanoGPT(True), torch.randint(50, (2, 7))
    count = model.h[0].attn.n_head
    message = rf"maps: h\.1\.attn has {count} heads \(0 to {count - 1}\), and no head 99"
    with pytest.raises(em.ConfigurationError, match=message), em.capture(model, maps={"h.1.*": [99]}) as seen:
        for _ in range(5):
            model(x)
    with pytest.raises(em.ConfigurationError, match=message):
        seen.maps  # noqa: B018
    assert seen.heads.rows_read.tolist() == [5 * 14] * len(seen.heads)
    assert set(seen.heads.layer) == {"h.0.attn", "h.1.attn"}
    assert seen.faults == {}


def test_the_users_error_is_not_hidden_by_ours() -> None:
    model, x = NanoGPT(True), torch.randint(50, (2, 7))
    with pytest.raises(TypeError, match="unexpected keyword"), em.capture(model, maps={"h.1.*": [99]}):
        model(model(x).argmax(-1), own_mistake=True)


def test_integers_of_other_kinds() -> None:
    model, x = NanoGPT(True), torch.randint(50, (2, 7))
    assert em.measure(model, x, rows=np.int64(3)).equals(em.measure(model, x, rows=3))


def break_reading(monkeypatch: pytest.MonkeyPatch, layers: tuple[str, ...]) -> None:
    from entropy_monitor.hooks import Recorder

    read = Recorder.attention

    def broken(self: Recorder, call: AttentionCall) -> None:
        if call.layer in layers:
            raise ValueError("broken by hand")
        read(self, call)

    monkeypatch.setattr(Recorder, "attention", broken)


def test_a_layer_that_cannot_be_read_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = NanoGPT(True), torch.randint(50, (2, 7))
    want = model(x)
    break_reading(monkeypatch, ("h.0.attn",))
    with caplog.at_level(logging.WARNING, "entropy_monitor"), em.capture(model) as seen:
        assert torch.equal(model(x), want)
    assert set(seen.heads.layer) == {"h.1.attn"}
    assert seen.faults["reading h.0.attn"] >= 1
    assert "reading h.0.attn failed" in caplog.text
    assert set(em.measure(model, x).layer) == {"h.1.attn"}


def test_no_layer_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    break_reading(monkeypatch, ("h.0.attn", "h.1.attn"))
    with pytest.raises(em.AttentionNotFoundError) as caught:
        em.measure(NanoGPT(True), torch.randint(50, (2, 7)))
    assert "Reading failed ({'reading h.0.attn': " in str(caught.value)
    assert str(caught.value).endswith("; the log says why.")


class Scripted(nn.Module):
    """A model of which one part is TorchScript."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.inner, self.part = NanoGPT(True), part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.inner(x))


def test_torchscript_with_attention() -> None:
    x = torch.randint(50, (2, 7))
    traced = torch.jit.trace(NanoGPT(True).eval(), x)
    with pytest.raises(em.ConfigurationError, match=r"^TopLevelTracedModule, ") as caught:
        em.measure(traced, x)
    assert "attention inside TorchScript (torch.jit.script, torch.jit.trace) cannot be read" in str(
        caught.value
    )
    with pytest.raises(em.ConfigurationError, match="part: attention inside TorchScript"):
        em.measure(Scripted(torch.jit.script(nn.Softmax(-1))), x)


def test_torchscript_without_attention() -> None:
    model, x = Scripted(torch.jit.script(nn.BatchNorm1d(7))), torch.randint(50, (2, 7))
    assert set(em.measure(model, x).layer) == {"inner.h.0.attn", "inner.h.1.attn"}
    assert model.part.running_mean.tolist() == [0.0] * 7


class Restless(nn.Module):
    """A forward that moves everything a forward can move."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = NanoGPT(False, dropout=0.5), nn.BatchNorm1d(50)
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("cache", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        self.cache = torch.zeros(3)
        self.norm.eval()
        return F.dropout(self.norm.train()(self.inner(x).flatten(0, 1)), 0.5)


def test_measure_puts_everything_back() -> None:
    model, x = Restless(), torch.randint(50, (2, 7))
    model.norm.eval()
    count, buffers = model.count, {n: b.clone() for n, b in model.named_buffers()}
    state = torch.get_rng_state()
    em.measure(model, x)
    assert model.count is count
    assert model.cache is None
    assert not model.norm.training
    assert model.training
    assert {n: b.tolist() for n, b in model.named_buffers()} == {n: b.tolist() for n, b in buffers.items()}
    assert torch.equal(torch.get_rng_state(), state)


class Rotary(nn.Module):
    """Keeps a table as long as the longest sequence so far, and its length beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.longest = NanoGPT(True), 0
        self.register_buffer("table", torch.zeros(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > self.longest:
            self.longest = x.shape[1]
            self.register_buffer("table", torch.ones(self.longest), persistent=False)
            self.seen = True
        return self.inner(x) * self.table[: x.shape[1], None]


def test_a_cache_and_its_length_go_back_together() -> None:
    model, x = Rotary(), torch.randint(50, (2, 7))
    dicts = {name: vars(model)[name] for name in ("_buffers", "_parameters", "_modules", "_forward_hooks")}
    em.measure(model, x)
    assert model.longest == 0
    assert model.table.shape == (0,)
    assert not hasattr(model, "seen")
    assert all(vars(model)[name] is before for name, before in dicts.items())
    assert model(x).shape == (2, 7, 50)


def test_a_lazy_module_stays_as_its_first_forward_made_it() -> None:
    model, x = nn.Sequential(NanoGPT(True), nn.LazyLinear(3), nn.LazyBatchNorm1d()), torch.randint(50, (2, 7))
    em.measure(model, x)
    assert type(model[1]) is nn.Linear
    assert model[1].in_features == 50
    assert model(x).shape == (2, 7, 3)


def test_untouched_buffers_are_not_written() -> None:
    model, x = NanoGPT(False), torch.randint(50, (2, 7))
    loss = model(x).sum()  # its graph holds the causal buffers
    em.measure(model, x)
    loss.backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["nanogpt-sdpa", "nanogpt-masked_fill", "hand-inplace", "mha-bool-True"])
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    model, inputs = built(ZOO[name])
    model = model.to(dtype)
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    table = em.measure(model, *inputs)
    tolerance = 1e-6 if dtype == torch.float64 else 2e-2
    for dense, (_, part) in zip(
        ZOO[name].dense(model, *inputs), table.groupby(["layer", "call"], sort=False), strict=True
    ):
        for column, want in figures(dense).items():
            assert part[column].tolist() == pytest.approx(want.tolist(), rel=tolerance, abs=tolerance), column


def test_autocast_reads_what_the_kernel_sees() -> None:
    model, x = NanoGPT(True), torch.randint(50, (2, 7))
    with torch.autocast("cpu", torch.bfloat16):
        low = em.measure(model, x)
    full = em.measure(model, x)
    assert low.entropy.tolist() == pytest.approx(full.entropy.tolist(), abs=2e-2)
    assert low.sigma_qk.tolist() == full.sigma_qk.tolist()
    assert low.entropy.tolist() != full.entropy.tolist()


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_encoder_fast_path_with_padding(mode: type) -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2).eval()
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[0, 5:] = padding[1, 3:] = True
    with mode(), em.capture(encoder) as seen:
        encoder(torch.randn(3, 7, 16), src_key_padding_mask=padding)
    log_n = torch.tensor([5.0, 3.0, 7.0]).log().mean().item()
    assert list(seen.heads.layer.unique()) == ["layers.0.self_attn", "layers.1.self_attn"]
    assert seen.heads.max_entropy.tolist() == pytest.approx([log_n] * 8)
    assert set(seen.heads.rows_read) == {21}


@pytest.mark.parametrize("train", [False, True])
def test_transformer_layers_in_order_of_execution(train: bool) -> None:
    model = nn.Transformer(16, 4, 2, 1, 32, batch_first=True).train(train)
    table = em.measure(model, torch.randn(3, 7, 16), torch.randn(3, 5, 16))
    names = ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn"]
    names += ["decoder.layers.0.self_attn", "decoder.layers.0.multihead_attn"]
    assert list(table.layer.unique()) == names
    assert table.layer_index.unique().tolist() == [0, 1, 2, 3]
    assert table.rows_read[::4].tolist() == [21, 21, 15, 15]


def test_an_adapter_that_starts_at_zero_adds_nothing() -> None:
    model, inputs = built(ZOO["weights-adapter"])
    nn.init.zeros_(model.b.weight)
    table = em.measure(model, *inputs)
    alone = torch.linalg.matrix_norm(model.wq.detach().unflatten(0, (len(table), -1)).double(), 2)
    assert table.sigma_q.to_list() == pytest.approx(alone.tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows must be a positive integer or 'all', got 0"),
        ({"rows": True}, "rows must be a positive integer or 'all', got True"),
        ({"owners": "h.0"}, "owners must be a list of name patterns, got the text 'h.0'"),
        ({"owners": ["x.*"]}, "owners: no module is named 'x.*'; NanoGPT has NanoGPT, wte, wpe, h"),
        ({"rows": np.bool_(True)}, "rows must be a positive integer or 'all', got "),
        ({"rows": 2.0}, "rows must be a positive integer or 'all', got 2.0"),
        ({"rows": np.arange(2)}, "rows must be a positive integer or 'all', got array([0, 1])"),
        ({"owners": None}, "owners must be a list of name patterns, got None"),
        ({"owners": 3}, "owners must be a list of name patterns, got 3"),
        ({"owners": [3]}, "owners must be a list of name patterns, got [3]"),
        ({"maps": "h.0"}, "or a dict from pattern to heads, got 'h.0'"),
        (
            {"maps": None},
            "maps must be True, False, a list of layer name patterns, or a dict from pattern to",
        ),
        ({"maps": 1}, "or a dict from pattern to heads, got 1"),
        ({"maps": [1]}, "or a dict from pattern to heads, got [1]"),
        (
            {"maps": {"h.0.attn": 5}},
            "maps['h.0.attn'] must be a list of heads, counted from 0, or 'all', got 5",
        ),
        ({"maps": {"h.0.attn": [-1]}}, "or 'all', got [-1]"),
        ({"maps": {"h.0.attn": [True]}}, "or 'all', got [True]"),
        ({"maps": ["x.*"]}, "maps: no module is named 'x.*'; NanoGPT has NanoGPT, wte, wpe, h"),
        ({"maps": {"x.*": [0]}}, "maps: no module is named 'x.*'"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(em.ConfigurationError) as caught, em.capture(NanoGPT(True), **options):
        pass
    assert message in str(caught.value)


def test_no_module() -> None:
    with pytest.raises(em.ConfigurationError, match=r"model must be a torch.nn.Module, got dict"):
        em.measure({})


def test_no_attention() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1))
    with pytest.raises(em.AttentionNotFoundError) as caught:
        em.measure(model, torch.randn(2, 4))
    text = str(caught.value)
    assert "No attention was found in Sequential: looked for F.scaled_dot_product_attention" in text
    assert "softmax of shape [2, 4] over dimension 1: its logits are no product" in text


def test_empty_before_the_first_forward() -> None:
    with em.capture(NanoGPT(True)) as seen:
        assert seen.heads.empty
        assert seen.maps == {}
