"""What the plan of a compiled call holds, each detail by a model whose figures it decides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import entropy_monitor as em
from tests.compiled.conftest import left_behind
from tests.compiled.figures import assert_same_figures, assert_same_rows
from tests.compiled.models import HEADS, TOKENS, WIDTH, Attention, ByHand, VectorMapped
from tests.families import FAMILIES

OF_WEIGHTS = ["sigma_q", "sigma_k", "sigma_qk"]


def inputs() -> Tensor:
    return torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


def figures(model: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with em.capture(model) as seen:
        forward(*args, **kwargs)
    assert seen.faults == {}
    return seen.heads


# Autocast


def test_spectral_norms_under_autocast() -> None:
    """Queries are bf16 then, and their projection must be looked for with the room that bf16 needs."""
    family = FAMILIES["llama"]
    model, given = family.model("sdpa"), family.inputs()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        eager = figures(model, model, **given)
        found = figures(model, compiled, **given)
    assert_same_rows(found, eager)
    assert_same_figures(found[OF_WEIGHTS], eager[OF_WEIGHTS], 1e-6)
    for call in family.calls(model):
        rows = found[found.layer == call.layer]
        norms = {"sigma_q": call.w_q, "sigma_k": call.w_k, "sigma_qk": call.w_k @ call.w_q.mT}
        for name, weight in norms.items():
            got = torch.tensor(rows[name].to_numpy(), dtype=torch.float64)
            torch.testing.assert_close(got, torch.linalg.matrix_norm(weight, 2), rtol=1e-5, atol=0)


class Cast(Attention):
    """Autocast is on within the attention alone, from before its projections or from after them."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.whole):
            q, k, v = self.heads(x)
            with torch.autocast("cpu", torch.bfloat16):
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.join(y.float())


class Chosen(Attention):
    """The kernel is chosen around the attention."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        with sdpa_kernel(SDPBackend.MATH):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.join(y)


class Ungraded(Attention):
    """Keys are made without gradients."""

    def forward(self, x: Tensor) -> Tensor:
        q, _, v = self.heads(x)
        with torch.no_grad():
            k = self.k(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        return self.join(F.scaled_dot_product_attention(q, k, v, is_causal=True))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "autocast": lambda: Cast(whole=True),
    "autocast after the projections": lambda: Cast(whole=False),
    "sdpa_kernel": Chosen,
    "no_grad": Ungraded,
}


class Pair(nn.Module):
    """A root of the user's own: in one of torch's containers nothing tells whose forward a graph is."""

    def __init__(self, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.second = attention(), attention()

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        assert isinstance(y, Tensor)
        return y


@pytest.mark.parametrize("name", BLOCKS)
def test_contexts_between_projections_and_attention(name: str) -> None:
    """Their nodes tell of no module: the one that ran goes on, and with it its projections' inputs."""
    torch.manual_seed(0)
    model, x = Pair(BLOCKS[name]), inputs()
    eager = figures(model, model, x)
    found = figures(model, torch.compile(model, backend="aot_eager", fullgraph=True), x)
    assert found.layer.unique().tolist() == ["first", "second"]
    assert found[[*OF_WEIGHTS, "floor_weights"]].notna().all().all()
    assert_same_rows(found, eager)
    assert_same_figures(found, eager, 2e-2 if "autocast" in name else 1e-5)
    assert left_behind() == []


# Order


class Branches(nn.Module):
    """Layers side by side, none of which waits for another."""

    def __init__(self, attention: type[nn.Module] = Attention) -> None:
        super().__init__()
        self.parts = nn.ModuleList(attention() for _ in range(3))
        self.last = attention()

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = (part(x) for part in self.parts)
        return self.last(a + b + c)


def last_first(module: fx.GraphModule, example: Any) -> Callable[..., Any]:
    """A backend that runs of all nodes that can be run the one that was written last, as Inductor may."""
    graph = module.graph
    given = [n for n in graph.nodes if n.op in ("placeholder", "get_attr")]
    rest = [n for n in graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    ready, done = [], set(given)
    while rest:
        node = next(n for n in reversed(rest) if done.issuperset(n.all_input_nodes))
        rest.remove(node)
        done.add(node)
        ready.append(node)
    end = next(n for n in graph.nodes if n.op == "output")
    for node in ready:
        end.prepend(node)
    graph.lint()
    module.recompile()
    return module.forward


@pytest.mark.parametrize("attention", [Attention, ByHand])
def test_layers_are_told_in_the_order_in_which_they_are_written(
    attention: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    from entropy_monitor.hooks.recorder import Recorder

    ran: list[str] = []
    attend = Recorder.attention

    def noted(recorder: Recorder, call: Any) -> None:
        ran.append(call.layer)
        attend(recorder, call)

    torch.manual_seed(0)
    model, x = Branches(attention), inputs()
    eager = figures(model, model, x)
    monkeypatch.setattr(Recorder, "attention", noted)
    found = figures(model, torch.compile(model, backend=last_first, fullgraph=True), x)
    written = ["parts.0", "parts.1", "parts.2", "last"]
    assert ran[:2] == ["parts.2", "parts.1"]  # or the order would need no telling
    assert sorted(ran) == sorted(written)
    assert_same_rows(found, eager)
    assert found.layer.unique().tolist() == written
    assert_same_figures(found, eager, 1e-5)


@pytest.mark.full
def test_the_order_under_inductor() -> None:
    torch.manual_seed(0)
    model, x = Branches(ByHand), inputs()
    eager = figures(model, model, x)
    found = figures(model, torch.compile(model, backend="inductor", fullgraph=True), x)
    assert_same_rows(found, eager)
    assert_same_figures(found, eager, 1e-4)


def test_one_plan_for_several_blocks_keeps_their_order() -> None:
    """Blocks that were compiled apart share code: its order is of whichever was compiled first."""
    torch.manual_seed(0)
    model, x = nn.ModuleList(Branches() for _ in range(3)), inputs()
    for block in model:
        block.compile(backend=last_first, fullgraph=True)

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = model

        def forward(self, y: Tensor) -> Tensor:
            for block in self.blocks:
                y = block(y)
            return y

    around = Around()
    found = figures(around, around, x)
    names = ["parts.0", "parts.1", "parts.2", "last"]
    assert found.layer.unique().tolist() == [f"blocks.{i}.{name}" for i in range(3) for name in names]


# A compiled root that owns the attention


@pytest.mark.parametrize("watched", ["what is compiled", "what it was made of"])
@pytest.mark.parametrize("attention", [Attention, ByHand])
def test_attention_of_a_compiled_root(attention: type[nn.Module], watched: str) -> None:
    """The owner's parameters have no prefix, and two modules answer to the empty path."""
    torch.manual_seed(0)
    model, x = attention(), inputs()
    eager = figures(model, model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = figures(compiled if watched == "what is compiled" else model, compiled, x)
    assert found.layer.unique().tolist() == [attention.__name__]
    assert_same_rows(found, eager)
    assert_same_figures(found, eager, 1e-5)
    assert found[[*OF_WEIGHTS, "floor_weights"]].notna().all().all()


def test_a_monitored_compiled_root(tmp_path: Any) -> None:
    torch.manual_seed(0)
    compiled = torch.compile(Attention(), backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.SGD(compiled.parameters(), 0.1)
    with em.EntropyMonitor(compiled, optimizer=optimizer, run_dir=tmp_path, every=1) as monitor:
        for _ in range(2):
            compiled(inputs()).sum().backward()
            optimizer.step()
            assert monitor.step().measured
    assert monitor.faults == {}
    run = em.load_run(tmp_path)
    assert set(run.heads["layer"]) == {"Attention"}
    assert (
        run.layers[["sigma_q", "sigma_k", "sigma_v", "sigma_o", "grad_l2", "grad_linf"]].notna().all().all()
    )


# Transforms within a graph


class Mapped(VectorMapped):
    """Its attention itself runs under a vmap."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        maps = torch.vmap(lambda a, b: (a @ b.transpose(-2, -1)).softmax(-1))(q, k)
        return self.join(maps @ v)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_attention_under_vmap_in_a_graph_is_left_out(backend: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Attention(), Mapped()), inputs()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    expected = compiled(x)
    with em.capture(model) as seen:
        assert torch.equal(compiled(x), expected)
    assert seen.faults == {}
    assert seen.heads.layer.tolist() == ["0"] * HEADS
    assert "inside torch.func.vmap" in str(seen.describe())
