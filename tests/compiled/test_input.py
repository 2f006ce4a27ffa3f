"""What users do beside compiling and training: several models, stances, copies, errors, threads."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

import entropy_monitor as em
from tests.compiled.conftest import left_behind
from tests.compiled.models import TOKENS, WIDTH, Attention, Disabled, Net
from tests.compiled.modes import each, function, in_place, method, whole, wrapped_blocks

WAYS = {
    "whole": whole("eager"),
    "in place": in_place("eager"),
    "blocks": each("", "eager"),
    "blocks wrapped": wrapped_blocks,
    "function": function,
    "forward": method(),
}
QUICK = ("whole", "blocks")
ways = pytest.mark.parametrize(
    "way",
    [pytest.param(w, id=n, marks=[] if n in QUICK else [pytest.mark.full]) for n, w in WAYS.items()],
)


def inputs(tokens: int = TOKENS) -> Tensor:
    return torch.randn(2, tokens, WIDTH)


def rows(seen: Any) -> list[tuple[str, int, int]]:
    """What was read: layer, call, rows."""
    table = seen.heads[["layer", "call", "rows_read"]].drop_duplicates()
    return [(str(layer), int(call), int(n)) for layer, call, n in table.to_numpy()]


def both(prefix: str = "", forwards: int = 1) -> list[tuple[str, int, int]]:
    return [(f"{prefix}blocks.{i}.attn", 0, 2 * TOKENS * forwards) for i in range(2)]


def gradients(model: nn.Module, out: Tensor) -> list[Tensor]:
    model.zero_grad()
    out.square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


# Which model


@ways
def test_only_the_watched_of_two(way: Any) -> None:
    teacher, student = Net(), Net()
    one, two = way(teacher), way(student)
    with em.capture(student) as seen:
        one(inputs())
        two(inputs())
        one(inputs())
    assert rows(seen) == both()
    assert seen.faults == {}


@ways
def test_one_after_the_other(way: Any) -> None:
    """What was compiled while another model was watched does not hide this one's attention."""
    first, second = Net(), Net()
    one, two = way(first), way(second)
    with em.capture(first) as a:
        one(inputs())
        two(inputs())
    with em.capture(second) as b:
        one(inputs())
        two(inputs())
    with em.capture(first) as c, em.capture(second) as d:
        one(inputs())
        two(inputs())
    assert [rows(seen) for seen in (a, b, c, d)] == [both()] * 4


def test_parts_and_the_whole() -> None:
    model = Net()
    compiled = torch.compile(model, backend="eager")
    alone = []
    for part in (model.blocks[1], model, model.blocks[0]):
        with em.capture(part) as seen:
            compiled(inputs())
        alone.append(rows(seen))
    assert alone == [[("attn", 0, 12)], both(), [("attn", 0, 12)]]
    with em.capture(model.blocks[1]) as a, em.capture(model, maps=True) as b:
        compiled(inputs())
    assert rows(a) == [("attn", 0, 12)]
    assert rows(b) == both()
    assert [len(maps) for maps in b.maps.values()] == [1, 1]


def test_a_teacher_in_the_same_graph() -> None:
    class Distilled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher, self.student = Net(), Net()

        def forward(self, x: Tensor) -> Tensor:
            return self.student(x) - self.teacher(x).detach()

    model = Distilled()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with em.capture(model.student) as part:
        compiled(inputs())
    with em.capture(model) as whole_model:
        compiled(inputs())
    assert part.faults == whole_model.faults == {}
    assert rows(part) == both()
    assert sorted(rows(whole_model)) == both("student.") + both("teacher.")


def test_two_monitors(tmp_path: Path) -> None:
    models = [Net(), Net()]
    compiled = [torch.compile(m, backend="eager", fullgraph=True) for m in models]
    monitors = [em.EntropyMonitor(m, run_dir=tmp_path / str(i), every=1) for i, m in enumerate(models)]
    for _ in range(3):
        for forward in compiled:
            forward(inputs()).sum().backward()
        for monitor in monitors:
            assert monitor.step().measured
    for monitor in monitors:
        monitor.close()
        assert monitor.faults == {}
    for i in range(2):
        heads = em.load_run(tmp_path / str(i)).heads
        assert sorted(set(heads["step"])) == [0, 1, 2]
        assert set(heads["rows_read"]) == {2 * TOKENS}


def test_capture_within_a_run(tmp_path: Path) -> None:
    model = Net()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    monitor = em.EntropyMonitor(model, run_dir=tmp_path, every=3)
    for step in range(5):
        with em.capture(model) as seen:
            compiled(inputs()).sum().backward()
        assert rows(seen) == both()
        assert monitor.step().measured == (step % 3 == 0)
    monitor.close()
    assert counters["stats"]["unique_graphs"] <= 2


# When it is watched and when it is compiled


@ways
@pytest.mark.parametrize("when", ["after the first call", "before it is compiled"])
def test_when_watching_begins(way: Any, when: str) -> None:
    model = Net()
    if when == "before it is compiled":
        with em.capture(model) as seen:
            way(model)(inputs())
    else:
        forward = way(model)
        forward(inputs())
        with em.capture(model) as seen:
            forward(inputs())
    assert rows(seen) == both()


def test_compiled_anew_while_watched() -> None:
    model = Net()
    with em.capture(model) as seen:
        model(inputs())
        model.compile(backend="eager")
        model(inputs())
        model.compile(backend="aot_eager")
        model(inputs())
        each("", "eager")(model)
        model(inputs())
    assert rows(seen) == both(forwards=4)
    compiled = model._compiled_call_impl
    assert type(compiled).__module__.split(".")[0] != "entropy_monitor"
    model(inputs())


@pytest.mark.parametrize("watched", ["forward", "backward"])
@pytest.mark.parametrize("how", ["plain", pytest.param("reentrant", marks=pytest.mark.full)])
def test_watched_in_one_half_of_checkpointing(watched: str, how: str) -> None:
    """The forward that runs again is then not the version that ran: it must save the same."""
    model = Net(checkpointing=how, dropout=0.1)
    each("", "aot_eager")(model)

    def step(now: str) -> tuple[list[Tensor], list[tuple[str, int, int]]]:
        torch.manual_seed(1)
        x = inputs().requires_grad_()
        if now == "forward":
            with em.capture(model) as seen:
                y = model(x)
            return gradients(model, y), rows(seen)
        y = model(x)
        if now == "backward":
            with em.capture(model) as seen:
                return gradients(model, y), rows(seen)
        return gradients(model, y), []

    plain, _ = step("")
    found, read = step(watched)
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    assert read == (both() if watched == "forward" else [])


# How it runs


@ways
def test_forced_to_run_eagerly(way: Any) -> None:
    model = Net()
    forward = way(model)
    with torch.compiler.set_stance("force_eager"), em.capture(model) as seen:
        forward(inputs())
    assert rows(seen) == both()
    assert counters["stats"]["unique_graphs"] == 0


@pytest.mark.parametrize("stance", ["fail_on_recompile", "eager_on_recompile"])
@ways
def test_no_compiling_is_allowed(way: Any, stance: str) -> None:
    """What is not read is not read; the forward is the same, and nothing is compiled."""
    model, x = Net(), inputs()
    forward = way(model)
    expected = forward(x)
    graphs = counters["stats"]["unique_graphs"]
    with torch.compiler.set_stance(stance), em.capture(model) as seen:
        assert torch.equal(forward(x), expected)
    assert counters["stats"]["unique_graphs"] == graphs
    assert rows(seen) in ([], both())
    with em.capture(model) as seen:
        assert torch.equal(forward(x), expected)
    assert rows(seen) == both()


def test_a_stance_between_measured_steps(tmp_path: Path) -> None:
    model = Net()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with em.EntropyMonitor(model, run_dir=tmp_path, every=2) as monitor:
        for step in range(6):
            warm = step > 1
            with torch.compiler.set_stance("fail_on_recompile" if warm and step % 2 else "default"):
                compiled(inputs()).sum().backward()
            assert monitor.step().measured == (step % 2 == 0)
    assert monitor.faults == {}


def test_compiling_switched_off() -> None:
    for options in ({"disable": True}, {}):
        model = Net()
        with torch._dynamo.config.patch(disable=not options), em.capture(model) as seen:
            model.compile(**options)
            model(inputs())
            torch.compile(model, **options)(inputs())
        assert rows(seen) == both(forwards=2)


def test_attention_that_is_kept_from_compiling() -> None:
    model = Net(Disabled)
    compiled = torch.compile(model, backend="eager")
    with em.capture(model) as seen:
        compiled(inputs())
    assert rows(seen) == both()


def test_no_gradients() -> None:
    model = Net().eval()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.inference_mode(), em.capture(model) as seen:
        compiled(inputs())
    assert rows(seen) == both()


def test_threads() -> None:
    model = Net()
    compiled = torch.compile(model, backend="eager")
    with em.capture(model):
        compiled(inputs())  # while a thread compiles, others are not seen
    with em.capture(model) as seen:
        threads = [threading.Thread(target=lambda: [compiled(inputs()) for _ in range(3)]) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert rows(seen) == both(forwards=9)


def test_compiled_step_and_optimizer() -> None:
    def trained(watched: bool) -> tuple[list[Tensor], list[int]]:
        torch.compiler.reset()
        counters.clear()
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        update = torch.compile(optimizer.step, backend="eager")

        @torch.compile(backend="aot_eager")
        def forward_and_backward(x: Tensor) -> Tensor:
            loss = model(x).square().mean()
            loss.backward()
            return loss

        graphs = []
        for step in range(5):
            x = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(step))
            if watched and step % 2 == 0:
                with em.capture(model) as seen:
                    forward_and_backward(x)
                    update()
                assert rows(seen) == both()
            else:
                forward_and_backward(x)
                update()
            optimizer.zero_grad()
            graphs.append(counters["stats"]["unique_graphs"])
        return [p.detach().clone() for p in model.parameters()], graphs

    plain, _ = trained(watched=False)
    found, graphs = trained(watched=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    assert graphs[1:] == graphs[1:2] * 4 or graphs[2:] == graphs[2:3] * 3


@pytest.mark.full
def test_compiled_autograd() -> None:
    model = Net()
    compiled = torch.compile(model, backend="aot_eager")
    x = inputs()
    with torch._dynamo.config.patch(compiled_autograd=True):
        plain = gradients(model, compiled(x))
        with em.capture(model) as seen:
            found = gradients(model, compiled(x))
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    assert rows(seen) == both()


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "bucket",
    [pytest.param(25.0, id="one bucket", marks=pytest.mark.full), pytest.param(0.001, id="many buckets")],
)
@pytest.mark.parametrize(
    "way",
    ["outside", *(pytest.param(way, marks=pytest.mark.full) for way in ("inside", "in place", "blocks"))],
)
@pytest.mark.usefixtures("process_group")
def test_data_parallel(way: str, bucket: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo splits graphs at the buckets of DistributedDataParallel."""
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 512)
    model = Net()
    forward: Any
    if way == "inside":
        compiled = torch.compile(model, backend="aot_eager")
        forward = wrapper = DistributedDataParallel(compiled, bucket_cap_mb=bucket)
    else:
        if way == "blocks":
            each()(model)
        forward = wrapper = DistributedDataParallel(model, bucket_cap_mb=bucket)
        if way == "outside":
            forward = torch.compile(wrapper, backend="aot_eager")
        elif way == "in place":
            wrapper.compile(backend="aot_eager")
    x = inputs()
    plain = gradients(model, forward(x))
    with em.capture(wrapper) as seen:
        found = gradients(model, forward(x))
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    assert rows(seen) == both()


# What goes wrong, and what is left


def test_an_error_in_the_forward() -> None:
    class Failing(Net):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            torch._dynamo.graph_break()
            raise KeyError("stop")

    model = Failing()
    compiled = torch.compile(model, backend="eager")
    with em.capture(model) as seen:
        for _ in range(2):
            with pytest.raises(KeyError, match="stop"):
                compiled(inputs())
    assert rows(seen) == both(forwards=2)
    assert left_behind() == []


def test_a_backend_that_cannot_take_the_operator() -> None:
    def picky(module: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        if any("entropy_monitor" in str(node.target) for node in module.graph.nodes):
            raise RuntimeError("an operator that I do not know")
        return module.forward

    model, x = Net(), inputs()
    compiled = torch.compile(model, backend=picky, fullgraph=True)
    expected = compiled(x)
    with em.capture(model) as seen:
        assert torch.equal(compiled(x), expected)
    assert rows(seen) == []
    assert "an operator that I do not know" in str(seen.describe())


def test_copies_while_watched() -> None:
    model, x = Net(), inputs()
    model.compile(backend="eager")
    keys = list(model.state_dict())
    with em.capture(model) as seen:
        expected = model(x)
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        torch.save(model, io.BytesIO())
        assert list(model.state_dict()) == keys
        twins[0].compile(backend="eager")
        assert all(torch.equal(twin(x), expected) for twin in twins)  # not watched
    assert rows(seen) == both()


@ways
def test_nothing_is_left(way: Any) -> None:
    model = Net()
    forward = way(model)
    forward(inputs())
    before = [set(vars(m)) | set(m._forward_hooks) | set(m._buffers) for m in model.modules()]
    calls = [m._compiled_call_impl for m in model.modules()]
    with em.capture(model):
        forward(inputs())
        assert left_behind() != []
    assert left_behind() == []
    assert before == [set(vars(m)) | set(m._forward_hooks) | set(m._buffers) for m in model.modules()]
    assert all(a is b for a, b in zip(calls, [m._compiled_call_impl for m in model.modules()], strict=True))
    graphs = counters["stats"]["unique_graphs"]
    forward(inputs())  # the user's own version, as it was
    assert counters["stats"]["unique_graphs"] == graphs


@ways
def test_no_warning_is_ours(way: Any) -> None:
    """Torch warns of global hooks on compiled modules, in whatever context warnings are caught."""

    def told(watched: bool) -> set[str]:
        torch.compiler.reset()
        model = Net()
        forward = way(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if watched:
                with em.capture(model):
                    forward(inputs())
            else:
                forward(inputs())
        return {str(w.message) for w in caught}

    told(watched=True)
    assert told(watched=True) <= told(watched=False)


def test_a_measured_compiled_model() -> None:
    torch.manual_seed(0)
    model = Net(Attention)
    x = inputs()
    expected = em.measure(model, x)
    for compiled in (torch.compile(model, backend="eager"), in_place("eager")(model)):
        found = em.measure(compiled, x)
        assert list(found["layer"]) == list(expected["layer"])
        torch.testing.assert_close(
            torch.tensor(found["entropy"].to_numpy()), torch.tensor(expected["entropy"].to_numpy())
        )
