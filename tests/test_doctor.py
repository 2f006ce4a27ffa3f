"""The doctor: what is covered, whether watching changes anything, and clear words for what it cannot use."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from entropy_monitor.cli import main
from entropy_monitor.doctor import examine
from tests import odd_models


def target(name: str) -> str:
    return f"tests.odd_models:{name}"


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "entropy_monitor.cli", "doctor", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


def test_a_model_that_is_covered_and_left_alone() -> None:
    found = examine(target("gpt2"), train=True)
    assert found.is_well
    assert found.identical
    assert found.non_finite == ()
    assert [layer.layer for layer in found.description.layers] == [
        "transformer.h.0.attn",
        "transformer.h.1.attn",
    ]
    for layer in found.description.layers:
        assert (layer.heads, layer.key_heads, layer.head_size, layer.calls) == (4, 4, 8, 1)
        assert (layer.source, layer.attention) == ("scaled_dot_product_attention", "softmax")
        assert (layer.mask, layer.mode) == ("causal", "eager")
        assert set(layer.projections) == {"query", "key", "value", "output"}
    assert found.versions["torch"] == torch.__version__
    assert "transformers" in found.versions


@pytest.mark.parametrize("train", [False, True])
def test_what_is_not_covered_is_named(train: bool) -> None:
    found = examine(target("odd"), train=train)
    assert [layer.layer for layer in found.description.layers] == ["seen"]
    assert found.description.layers[0].mask == "additive: causal"
    missed = {item.module: item.reason for item in found.description.not_covered}
    assert set(missed) == {"kernel", "unused"}
    assert "no attention was seen in it" in missed["kernel"]
    assert "did not run" in missed["unused"]
    assert found.identical
    assert not found.is_well


def test_the_model_is_left_as_it_was() -> None:
    model, x = odd_models.odd()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    module = sys.modules["tests.odd_models"]
    original, module.odd = module.odd, lambda: (model, x)  # type: ignore[attr-defined]
    try:
        examine(target("odd"), train=True)
    finally:
        module.odd = original  # type: ignore[attr-defined]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_model_that_watching_changes() -> None:
    found = examine(target("restless"))
    assert found.repeatable
    assert found.identical is False
    assert found.difference == pytest.approx(1)
    assert not found.is_well
    assert "Watching changes outputs, by at most 1." in str(found)


def test_a_model_that_is_not_the_same_twice() -> None:
    found = examine(target("random"))
    assert found.identical is None
    assert not found.is_well
    assert "cannot be told" in str(found)


def test_a_lazy_model() -> None:
    found = examine(target("lazy"))
    assert found.is_well
    assert found.description.layers[0].mask == "causal"


def test_a_compiled_part_is_read() -> None:
    found = examine(target("compiled"), train=True)
    torch._dynamo.reset()
    assert [(d.layer, d.mode) for d in found.description.layers] == [("0", "eager"), ("1", "compiled")]
    assert found.is_well


def test_gradients_that_are_not_finite_are_named() -> None:
    found = examine(target("exploding"), train=True)
    assert set(found.non_finite) == {f"{m}.{p}" for m in "qkv" for p in ("weight", "bias")}
    assert not found.is_well


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tests.odd_models", "must be module:function, such as models.gpt:build, got 'tests.odd_models'"),
        ("tests.no_such:build", "cannot import tests.no_such from"),
        (target("no_such"), "tests.odd_models has no 'no_such'"),
        (target("nothing"), "is no function, but int"),
        (target("no_pair"), r"returned Lazy; it must return (model, inputs)"),
        (target("no_model"), "returned tuple of str, Tensor; it must return (model, inputs)"),
        (target("wrong_inputs"), "returned inputs of type int"),
        (target("failing_build"), "raised FileNotFoundError: weights.pt. It is called without arguments"),
        (target("failing_forward"), "raised "),
        (target("without_attention"), "Sequential has no attention"),
        (target("on_meta"), "is on the meta device, which has a shape and no values"),
    ],
)
def test_what_cannot_be_used_is_told_without_a_traceback(
    name: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", name]) == 2
    err = capsys.readouterr().err
    assert err.startswith("entropy-monitor: ")
    assert text in err
    assert "Traceback" not in err


def test_the_command_on_gpt2_from_another_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(Path(odd_models.__file__).read_text("utf-8"), "utf-8")
    done = run("mine:gpt2", "--train", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["is_well"]
    assert [d["layer"] for d in found["description"]["layers"]] == [
        "transformer.h.0.attn",
        "transformer.h.1.attn",
    ]


def test_the_command_on_an_odd_model(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(Path(odd_models.__file__).read_text("utf-8"), "utf-8")
    done = run("mine:odd", cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Not covered:\n  kernel: it is expected to attend" in done.stdout
    assert "Watching changes nothing: outputs are the same to the bit" in done.stdout
    assert run("mine", cwd=tmp_path).returncode == 2
