"""What is covered and what not, and models that are attached to in odd ways: told, never silently missing."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules import module as torch_module

import entropy_monitor as em
from entropy_monitor.hooks.structure import unseen_attention
from tests import odd_models
from tests.families import FAMILIES
from tests.training import TOKENS, WIDTH, SeparateAttention, batches, tiny, train
from tests.zoo import ZOO


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    yield
    assert not torch_module._global_forward_hooks
    assert not torch_module._global_forward_pre_hooks
    torch._dynamo.reset()


def watched(model: Any, tmp_path: Path, **options: Any) -> tuple[torch.optim.Optimizer, em.EntropyMonitor]:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    options = {"every": 1, "run_dir": tmp_path / "run", **options}
    return optimizer, em.EntropyMonitor(model, optimizer=optimizer, **options)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "may be missing" in r.getMessage()]


def test_before_the_first_step_candidates_are_listed(tmp_path: Path) -> None:
    _, monitor = watched(tiny(), tmp_path)
    with monitor:
        found = monitor.describe()
        assert found.layers == ()
        assert {"blocks.0", "blocks.1"} <= set(found.candidates)
        assert "Tiny: nothing has been measured yet." in str(found)
        assert found.frame.empty


def test_what_is_found(tmp_path: Path) -> None:
    model = tiny()
    optimizer, monitor = watched(model, tmp_path)
    with monitor:
        train(model, optimizer, 2, monitor.step)
        found = monitor.describe()
    assert [(d.layer, d.layer_index, d.heads, d.key_heads, d.head_size) for d in found.layers] == [
        ("blocks.0", 0, 2, 2, WIDTH // 2),
        ("blocks.1", 1, 2, 2, WIDTH // 2),
    ]
    for layer in found.layers:
        assert set(layer.projections) == {"query", "key", "value", "output"}
    assert found.not_covered == ()
    assert list(found.frame["layer"]) == ["blocks.0", "blocks.1"]
    assert (found.frame["mask"] == "none").all()
    assert json.loads(json.dumps(found.to_dict()))["layers"][0]["layer"] == "blocks.0"
    plan = em.load_run(tmp_path / "run").plan
    assert plan["blocks.0"]["heads"] == 2
    assert plan["blocks.0"]["mask"] == "none"
    assert plan["blocks.1"]["projections"] == dict(found.layers[1].projections)


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_missing_in_a_family(name: str) -> None:
    """Modules that are no attention are not expected to be, in any family; and each owner would be missed."""
    family = FAMILIES[name]
    model = family.model(family.implementations[0])
    with em.capture(model) as seen, torch.no_grad():
        model(**family.inputs())
    found = seen.describe()
    assert found.not_covered == ()
    owners = [layer.layer for layer in found.layers]
    assert owners == list(dict.fromkeys(call.layer for call in family.calls(model)))
    for owner in owners:
        missed = unseen_attention(model, [other for other in owners if other != owner])
        assert missed == [owner]


@pytest.mark.parametrize("name", ZOO)
def test_nothing_is_missing_in_the_zoo(name: str) -> None:
    torch.manual_seed(0)
    model, *inputs = ZOO[name].build()
    model.train(ZOO[name].train)
    with em.capture(model) as seen, torch.no_grad():
        model(*inputs)
    found = seen.describe()
    assert found.not_covered == ()
    assert "is not covered" in str(found)


class Masked(nn.Module):
    """SDPA with a mask of one's own."""

    def __init__(self, mask: Tensor | None, is_causal: bool = False) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, 3 * WIDTH)
        self.mask, self.is_causal = mask, is_causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p.unflatten(-1, (2, -1)).transpose(1, 2) for p in self.proj(x).chunk(3, dim=-1))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, is_causal=self.is_causal)
        return out.transpose(1, 2).flatten(2)


class Softmaxed(Masked):
    """The same by hand."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p.unflatten(-1, (2, -1)).transpose(1, 2) for p in self.proj(x).chunk(3, dim=-1))
        logits = q @ k.mT / 2
        return (
            ((logits if self.mask is None else logits + self.mask).softmax(-1) @ v).transpose(1, 2).flatten(2)
        )


def additive(visible: Tensor) -> Tensor:
    return torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))


ones = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
causal = ones.tril()
window = causal & ones.triu(-2)
both_sides = ones.tril(2) & ones.triu(-1)
padded = torch.ones(2, 1, 1, TOKENS, dtype=torch.bool)
padded[1, ..., 4:] = False
blocks = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
blocks[:4, :4] = blocks[4:, 4:] = True

MASKS: dict[str, tuple[nn.Module, str]] = {
    "none": (Masked(None), "none"),
    "flag": (Masked(None, is_causal=True), "causal"),
    "boolean": (Masked(causal), "boolean: causal"),
    "additive": (Masked(additive(causal)), "additive: causal"),
    "all seen": (Masked(ones), "boolean, hides nothing"),
    "bias": (Masked(torch.randn(TOKENS, TOKENS)), "additive: bias"),
    "bias, causal": (Masked(torch.randn(TOKENS, TOKENS) + additive(causal)), "additive: causal + bias"),
    "window": (Masked(window), "boolean: window of 3"),
    "both sides": (Masked(both_sides), "boolean: window -1…+2"),
    "padding": (Masked(padded), "boolean: padding"),
    "causal, padding": (Masked(padded & causal), "boolean: causal + padding"),
    "documents": (Masked(blocks), "boolean: pattern"),
    "some documents": (Masked(torch.stack([causal, blocks])[:, None]), "boolean: causal + per sequence"),
    "by hand": (Softmaxed(None), "none"),
    "by hand, causal": (Softmaxed(additive(causal)), "causal"),
    "by hand, window": (Softmaxed(additive(window)), "window of 3"),
}


@pytest.mark.parametrize("name", MASKS)
def test_the_kind_of_mask(name: str) -> None:
    model, expected = MASKS[name]
    with em.capture(model) as seen:
        model(torch.randn(2, TOKENS, WIDTH))
    (layer,) = seen.describe().layers
    assert layer.mask == expected


def test_a_window_of_a_long_sequence() -> None:
    """Only some rows are looked at."""
    t = 1000
    rows, keys = torch.arange(t)[:, None], torch.arange(t)
    model = Masked((keys <= rows) & (keys > rows - 37))
    with em.capture(model) as seen:
        model(torch.randn(1, t, WIDTH))
    assert seen.describe().layers[0].mask == "boolean: window of 37"


def test_a_layer_that_is_missed_is_told_once_and_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = odd_models.odd()
    optimizer, monitor = watched(model, tmp_path)
    with monitor, caplog.at_level(logging.WARNING, "entropy_monitor"):
        for _ in range(3):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step()
        assert {item.module for item in monitor.describe().not_covered} == {"kernel", "unused"}
        assert monitor.faults == {}
    (told,) = warnings_of(caplog)
    assert "\n  kernel: " in told
    assert "\n  unused: " in told
    plan = em.load_run(tmp_path / "run").plan
    assert "no attention was seen" in plan["kernel"]["not_covered"]
    assert "did not run" in plan["unused"]["not_covered"]
    assert "not_covered" not in plan["seen"]


def test_a_second_monitor_is_refused_until_the_first_is_closed(tmp_path: Path) -> None:
    model = tiny()
    optimizer, first = watched(model, tmp_path)
    text = r"Tiny is watched already, by the EntropyMonitor that writes to .*run: call close\(\) on that one"
    for same in (model, nn.DataParallel(model), torch.compile(model, backend="eager")):
        with pytest.raises(em.ConfigurationError, match=text):
            em.EntropyMonitor(same, run_dir=tmp_path / "other")
    assert not (tmp_path / "other").exists()
    train(model, optimizer, 1, first.step)
    assert len(em.measure(model, torch.randn(1, TOKENS, WIDTH))) == 4  # beside it
    other = em.EntropyMonitor(tiny(), run_dir=tmp_path / "another")  # of another model
    other.close()
    first.close()
    with em.EntropyMonitor(model, run_dir=tmp_path / "other") as second:
        train(model, optimizer, 1, second.step)
        assert second.describe().layers


def test_a_layer_that_is_replaced_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny()
    optimizer, monitor = watched(model, tmp_path)
    with monitor, caplog.at_level(logging.WARNING, "entropy_monitor"):
        train(model, optimizer, 2, monitor.step)
        assert warnings_of(caplog) == []
        model.blocks[1] = SeparateAttention()
        train(model, optimizer, 3, monitor.step)
        missed = {item.module: item.reason for item in monitor.describe().not_covered}
        assert monitor.faults == {}
    assert "was not in the model when the monitor was attached" in missed["blocks.1"]
    (told,) = warnings_of(caplog)
    assert "\n  blocks.1: " in told
    assert "not_covered" in em.load_run(tmp_path / "run").plan["blocks.1"]


def test_a_layer_that_is_removed_does_no_harm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny()
    optimizer, monitor = watched(model, tmp_path)
    with monitor, caplog.at_level(logging.WARNING, "entropy_monitor"):
        train(model, optimizer, 2, monitor.step)
        del model.blocks[1]
        reports: list[Any] = []
        train(model, optimizer, 2, lambda loss: reports.append(monitor.step(loss)))
        assert all(report.measured for report in reports)
        assert monitor.faults == {}
    assert warnings_of(caplog) == []
    heads = em.load_run(tmp_path / "run").heads
    assert set(heads[heads["step"] >= 2]["layer"]) == {"blocks.0"}


def test_a_compiled_model_is_measured_without_compiling() -> None:
    compiled: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    x = torch.randn(2, TOKENS, WIDTH)
    model = tiny().eval()
    expected = em.measure(model, x)
    whole = torch.compile(model, backend=backend)
    in_place = tiny().eval()
    in_place.blocks[0].compile(backend=backend)
    whole(x)
    in_place(x)
    before = len(compiled)
    assert before >= 2
    for watched_model in (whole, in_place):
        table = em.measure(watched_model, x)
        assert table.equals(expected)
    whole(x)
    in_place(x)
    assert len(compiled) == before
    assert in_place.blocks[0]._compiled_call_impl is not None


def test_attaching_after_the_first_compiled_call(tmp_path: Path) -> None:
    model = tiny()
    compiled = torch.compile(model, backend="eager")
    x, _ = next(batches())
    compiled(x)
    optimizer, monitor = watched(compiled, tmp_path)
    with monitor:
        train(compiled, optimizer, 2, monitor.step)
        found = monitor.describe()
    assert [(d.layer, d.mode) for d in found.layers] == [("blocks.0", "compiled"), ("blocks.1", "compiled")]
    assert found.not_covered == ()


@pytest.fixture
def one_process() -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("kind", ["ddp", "ddp, compiled", "fsdp2", "data parallel"])
def test_a_model_that_is_wrapped_already(kind: str, tmp_path: Path) -> None:
    model: Any = tiny()
    if kind.startswith("ddp"):
        model = nn.parallel.DistributedDataParallel(model)
        if kind.endswith("compiled"):
            model = torch.compile(model, backend="eager")
    elif kind == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    else:
        model = nn.DataParallel(model)
    optimizer, monitor = watched(model, tmp_path)
    with monitor:
        train(model, optimizer, 2, monitor.step)
        found = monitor.describe()
        assert monitor.faults == {}
    assert [d.layer for d in found.layers] == ["blocks.0", "blocks.1"]
    assert found.not_covered == ()


def test_replicas_on_several_devices_are_refused(tmp_path: Path) -> None:
    model = nn.DataParallel(tiny())
    model.device_ids = [0, 1]
    with pytest.raises(
        em.ConfigurationError, match=r"nn\.DataParallel over 2 devices: .*DistributedDataParallel"
    ):
        em.EntropyMonitor(model, run_dir=tmp_path / "run")


def test_tensors_without_values() -> None:
    x = torch.randn(2, TOKENS, WIDTH)
    with pytest.raises(em.ConfigurationError, match=r"parameter blocks\.0\.q\.weight is on the meta device"):
        em.measure(tiny().to("meta"), x.to("meta"))
    with pytest.raises(em.ConfigurationError, match="an input is on the meta device"):
        em.measure(tiny(), x.to("meta"))
    with FakeTensorMode():
        fake, model = torch.randn(2, TOKENS, WIDTH), tiny()
        with pytest.raises(em.ConfigurationError, match="is a fake tensor"):
            em.measure(model, fake)
    with em.capture(model) as seen:
        model(fake)
    assert seen.heads.empty
    assert {item.module for item in seen.describe().not_covered} == {"blocks.0", "blocks.1"}
    assert all("have shapes and no values" in item.reason for item in seen.describe().not_covered)
    assert seen.faults == {}
    with em.capture(tiny().to("meta")) as seen:
        tiny().to("meta")(x.to("meta"))
    assert seen.heads.empty
    assert "on the meta device" in str(seen.describe())


def test_a_training_step_on_the_meta_device(tmp_path: Path) -> None:
    model = tiny().to("meta")
    _, monitor = watched(model, tmp_path)
    model(torch.randn(2, TOKENS, WIDTH, device="meta")).mean().backward()
    with pytest.raises(em.AttentionNotFoundError, match="on the meta device"):
        monitor.step()


def test_modules_that_are_made_in_the_first_forward(tmp_path: Path) -> None:
    model, x = odd_models.lazy()
    with pytest.raises(em.ConfigurationError, match=r"q\.weight, .* of Lazy are made by its first forward"):
        em.EntropyMonitor(model, run_dir=tmp_path / "run", every=1)
    assert not (tmp_path / "run").exists()
    monitor = em.EntropyMonitor(model, run_dir=tmp_path / "run", every=1, example_inputs=x)
    with monitor:
        for _ in range(2):
            model(x).mean().backward()
            monitor.step()
        found = monitor.describe()
        assert monitor.faults == {}
    assert [(d.layer, d.heads, d.mask) for d in found.layers] == [("Lazy", 2, "causal")]
    assert set(found.layers[0].projections) >= {"query", "key"}
