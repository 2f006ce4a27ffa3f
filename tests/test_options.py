from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from entropy_monitor import Thresholds, processes, run_info
from entropy_monitor import options as opt
from entropy_monitor.errors import AttentionNotFoundError, ConfigurationError, RunDirectoryError
from entropy_monitor.records import Sink
from entropy_monitor.trackers import FunctionLogger
from tests.training import TOKENS, WIDTH, ListSink, flat, tiny


@pytest.mark.parametrize("every", [0, -3, 2.0, "10", True, None])
def test_every(every: object) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(f"got {every!r}")):
        opt.check_every(every)
    opt.check_every(1)


@pytest.mark.parametrize(
    ("loggers", "text"),
    [
        ("tensorboard", "loggers must be a list of loggers, got 'tensorboard'"),
        (None, "loggers must be a list of loggers, got None"),
        (["wandb"], r"loggers\[0\] is 'wandb'; a logger is an instance of a class derived from"),
        (
            [ListSink(), ListSink],
            r"loggers\[1\] is <class .*ListSink'> \(the class: make an instance of it\)",
        ),
        ([3.5], r"loggers\[0\] is 3.5"),
        ([print, lambda metrics: None], r"loggers\[1\]: .*<lambda> cannot be a logger: too many positional"),
        ([print, print], r"loggers\[1\] is in the list twice"),
        (print, "loggers must be a list of loggers, got <built-in function print>"),
    ],
)
def test_loggers(loggers: object, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        opt.check_sinks(loggers)


def test_one_logger_is_no_list() -> None:
    with pytest.raises(ConfigurationError, match="must be a list of loggers"):
        opt.check_sinks(ListSink())


def test_a_logger_given_twice() -> None:
    sink = ListSink()
    with pytest.raises(ConfigurationError, match=r"loggers\[1\] is in the list twice"):
        opt.check_sinks([sink, sink])
    assert opt.check_sinks((sink, other := ListSink())) == (sink, other)
    assert isinstance(opt.check_sinks([Sink()])[0], Sink)


def test_a_callable_becomes_a_sink() -> None:
    sink = ListSink()
    first, second = opt.check_sinks([print, sink])
    assert isinstance(first, FunctionLogger)
    assert second is sink
    assert opt.check_sinks([first]) == (first,)


class Wrapped:
    def __init__(self, optimizer: object) -> None:
        self.optimizer = optimizer


def test_optimizers_are_unwrapped() -> None:
    model = tiny()
    one = torch.optim.SGD(model.blocks.parameters(), 0.1)
    two = torch.optim.AdamW(model.head.parameters())
    assert opt.check_optimizers(None, model) == ()
    assert opt.check_optimizers(one, model) == (one,)
    assert opt.check_optimizers([Wrapped(Wrapped(one)), two], model) == (one, two)


@pytest.mark.parametrize("given", ["adam", torch.optim.SGD, Wrapped(3)], ids=["text", "class", "wrapped"])
def test_no_optimizer(given: object) -> None:
    text = f"optimizer must be a torch.optim.Optimizer, or a list of them, got {type(given).__name__}"
    with pytest.raises(ConfigurationError, match=text):
        opt.check_optimizers(given, tiny())


def test_the_optimizer_of_another_model() -> None:
    with pytest.raises(ConfigurationError, match="optimizer holds no parameter of model: was the model"):
        opt.check_optimizers(torch.optim.SGD(tiny().parameters(), 0.1), tiny())


def test_on_alert_step_and_thresholds() -> None:
    with pytest.raises(ConfigurationError, match="on_alert must be callable, such as print, got 'print'"):
        opt.check_on_alert("print")
    with pytest.raises(ConfigurationError, match=r"step must be an integer, got 1\.5"):
        opt.check_step(1.5)
    with pytest.raises(
        ConfigurationError, match=r"thresholds must be entropy_monitor\.Thresholds\(…\), got dict"
    ):
        opt.check_thresholds({})
    opt.check_on_alert(None)
    opt.check_step(None)
    opt.check_step(torch.tensor(3))
    assert opt.check_thresholds(None) == Thresholds()
    assert opt.check_thresholds(mine := Thresholds()) is mine


def test_a_model_without_attention() -> None:
    with pytest.raises(AttentionNotFoundError, match=r"Sequential has no attention: .*owners=\['blocks"):
        opt.check_attention(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), (), None)


def test_owners_that_name_nothing() -> None:
    with pytest.raises(ConfigurationError, match=r"no module is named 'blocks\.7\.mixer'; Tiny has .*blocks"):
        opt.check_attention(tiny(), ["blocks.7.mixer"], None)


def test_a_compiled_model_or_part() -> None:
    opt.check_attention(torch.compile(tiny(), backend="eager"), (), None)
    model = tiny()
    model.blocks[1].compile(backend="eager")
    opt.check_attention(model, (), (torch.randn(1, TOKENS, WIDTH),))
    torch.compiler.reset()


def test_a_compiled_model_or_part_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opt, "compiled_code_is_read", lambda: False)
    with pytest.raises(ConfigurationError, match=rf"OptimizedModule is compiled.*{torch.__version__[:4]}"):
        opt.check_attention(torch.compile(tiny(), backend="eager"), (), None)
    model = tiny()
    model.blocks[1].compile(backend="eager")
    with pytest.raises(ConfigurationError, match=r"blocks\.1 is compiled"):
        opt.check_attention(model, (), None)


@pytest.mark.parametrize("form", ["tuple", "dict", "tensor"])
def test_example_inputs_leave_no_trace(form: str) -> None:
    model, x = tiny(dropout=0.5), torch.randn(1, TOKENS, WIDTH)
    before, state = flat(model), torch.get_rng_state()
    opt.check_attention(model, (), {"tuple": (x,), "dict": {"x": x}, "tensor": x}[form])
    assert torch.equal(flat(model), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_example_inputs_that_do_not_fit() -> None:
    with pytest.raises(
        ConfigurationError, match=r"example_inputs: the forward of Tiny raised TypeError: .*tuple"
    ):
        opt.check_attention(tiny(), (), {"y": 3})


def test_example_inputs_of_a_model_whose_attention_hides() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.Sequential(nn.Linear(3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x)

    with pytest.raises(AttentionNotFoundError, match="No attention was found in Named"):
        opt.check_attention(Named(), (), (torch.ones(2, 3),))


@pytest.mark.parametrize("run_dir", [3, b"x" * 3, ["runs"]])
def test_run_dir_that_is_no_path(run_dir: Any) -> None:
    with pytest.raises(ConfigurationError, match="run_dir must be a path, got"):
        opt.check_run_path(run_dir, tiny(), {})


def test_run_dir_that_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "run"
    file.write_text("precious")
    with pytest.raises(RunDirectoryError, match=re.escape(str(file))):
        opt.check_run_path(file, tiny(), run_info.describe_model(tiny()))
    assert file.read_text() == "precious"


def test_fresh_run_dirs_differ_and_are_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "20260101-000000")
    description = run_info.describe_model(tiny())
    first = opt.check_run_path(None, tiny(), description)
    assert first == Path("runs/20260101-000000-Tiny")
    assert not first.exists()
    first.mkdir(parents=True)
    assert opt.check_run_path(None, tiny(), description) == Path("runs/20260101-000000-Tiny-2")


def test_ranks_must_be_told_their_run_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "is_distributed", lambda: True)
    with pytest.raises(ConfigurationError, match="run_dir must be given in distributed training"):
        opt.check_run_path(None, tiny(), {})


def test_one_process_is_rank_0() -> None:
    assert not processes.is_distributed()
    assert processes.rank() == 0


def test_describe_model_and_versions() -> None:
    described = run_info.describe_model(tiny())
    assert described["class"] == "Tiny"
    assert described["parameters"]["blocks.0.q.weight"] == [WIDTH, WIDTH]
    assert run_info.versions()["torch"] == torch.__version__
    assert set(run_info.versions()) == {"python", "torch", "entropy_monitor"}
