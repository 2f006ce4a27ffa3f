"""Mistakes are told before training, with the value and the way out, and nothing is left behind."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_module

from entropy_monitor import (
    AttentionNotFoundError,
    ConfigurationError,
    EntropyMonitor,
    EntropyMonitorError,
    RunDirectoryError,
)
from entropy_monitor import monitor as monitor_module
from entropy_monitor.records import RunInfo, Sink
from tests.training import TOKENS, WIDTH, FusedAttention, ListSink, tiny, train


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    threads = threading.active_count()
    yield
    assert threading.active_count() == threads
    assert not torch_module._global_forward_hooks
    assert not torch_module._global_forward_pre_hooks
    assert not list(monitor_module._open)


class Unwilling(Sink):
    def open(self, info: RunInfo) -> None:
        raise MemoryError("no account")


def without_attention() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"every": "often"},
            ConfigurationError,
            r"every must be a positive integer .* or 'auto', got 'often'",
        ),
        ({"budget": 0}, ConfigurationError, "budget must be a positive number .* got 0"),
        ({"budget": "1%"}, ConfigurationError, "budget must be a positive number .* got '1%'"),
        ({"every": 0}, ConfigurationError, r"every must be a positive integer .* got 0"),
        (
            {"rows": "many"},
            ConfigurationError,
            "rows must be a positive integer, 'all' or 'auto', got 'many'",
        ),
        ({"loggers": "wandb"}, ConfigurationError, "loggers must be a list of loggers, got 'wandb'"),
        ({"loggers": [ListSink]}, ConfigurationError, "make an instance of it"),
        ({"optimizer": "adam"}, ConfigurationError, r"optimizer must be a torch\.optim\.Optimizer"),
        ({"on_alert": 3}, ConfigurationError, "on_alert must be callable, such as print, got 3"),
        ({"thresholds": 0.1}, ConfigurationError, "thresholds must be"),
        ({"owners": "blocks.0"}, ConfigurationError, "owners must be a list of name patterns"),
        ({"owners": ["mixer"]}, ConfigurationError, "no module is named 'mixer'"),
        ({"example_inputs": (3,)}, ConfigurationError, "example_inputs: the forward of Tiny raised"),
        ({"run_dir": 7}, ConfigurationError, "run_dir must be a path, got 7"),
        ({"model": "vit"}, ConfigurationError, r"model must be a torch\.nn\.Module, got str"),
        ({"model": without_attention()}, AttentionNotFoundError, "Sequential has no attention"),
        ({"loggers": [ListSink(), Unwilling()]}, MemoryError, "no account"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_argument_that_is_wrong(
    options: dict[str, Any], error: type[Exception], text: str, tmp_path: Path
) -> None:
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    given = {"model": model, "optimizer": optimizer, "run_dir": tmp_path / "run", **options}
    if isinstance(given["model"], nn.Sequential):
        given["optimizer"] = None
    with pytest.raises(error, match=text):
        EntropyMonitor(**given)
    assert list(tmp_path.iterdir()) == []
    assert not optimizer._optimizer_step_pre_hooks
    for sink in options.get("loggers", ()):
        if isinstance(sink, ListSink):
            assert sink.calls == ["close"]


def files(path: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_another_models_run_is_not_touched(tmp_path: Path) -> None:
    first = EntropyMonitor(tiny(), run_dir=tmp_path)
    first.close()
    before, sink = files(tmp_path), ListSink()
    text = r"holds the run of another model: parameter 'blocks\.0\.qkv\.weight' does not exist in that run"
    with pytest.raises(RunDirectoryError, match=text):
        EntropyMonitor(tiny(FusedAttention), run_dir=tmp_path, loggers=[sink])
    assert files(tmp_path) == before
    assert sink.info is None


def test_a_damaged_run_is_not_touched(tmp_path: Path) -> None:
    EntropyMonitor(tiny(), run_dir=tmp_path).close()
    (tmp_path / "run.json").write_text("{}")
    before = files(tmp_path)
    with pytest.raises(RunDirectoryError, match=re.escape(str(tmp_path))):
        EntropyMonitor(tiny(), run_dir=tmp_path)
    assert files(tmp_path) == before


def test_a_file_in_the_place_of_the_run(tmp_path: Path) -> None:
    file = tmp_path / "run"
    file.write_text("precious")
    with pytest.raises(RunDirectoryError, match="cannot be a directory"):
        EntropyMonitor(tiny(), run_dir=file)
    assert files(tmp_path) == {str(file): b"precious"}


class Hidden(nn.Module):
    """Its name promises an attention that its forward does not compute."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(WIDTH, 3)
        self.body = nn.ModuleDict({"attn": nn.Sequential(nn.Linear(WIDTH, 3))})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body["attn"](x).mean(1)


def first_step(model: nn.Module, run_dir: Path, forward: Any) -> str:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = EntropyMonitor(model, optimizer=optimizer, run_dir=run_dir)
    forward(model)
    with pytest.raises(AttentionNotFoundError) as caught:
        monitor.step(0.5)
    assert not optimizer._optimizer_step_pre_hooks
    assert monitor.step(0.5).measured is False  # closed: says nothing any more
    return str(caught.value)


def ahead(model: nn.Module) -> None:
    x = torch.randn(2, TOKENS, WIDTH)
    F.cross_entropy(model(x), torch.tensor([0, 1])).backward()


def no_grad(model: nn.Module) -> None:
    with torch.no_grad():
        model(torch.randn(2, TOKENS, WIDTH))


def evaluated(model: nn.Module) -> None:
    model.eval()
    model(torch.randn(2, TOKENS, WIDTH))


@pytest.mark.parametrize(
    ("model", "forward", "text"),
    [
        (tiny, lambda model: None, "no forward of this model ran"),
        (tiny, no_grad, r"1 without gradients \(torch.no_grad\)"),
        (tiny, evaluated, "1 in eval mode"),
        (Hidden, ahead, "looked for F.scaled_dot_product_attention"),
    ],
    ids=["forgotten", "no_grad", "eval", "none"],
)
def test_the_first_step_tells_what_is_missing(model: Any, forward: Any, text: str, tmp_path: Path) -> None:
    assert re.search(text, first_step(model(), tmp_path / "run", forward))


def test_the_first_step_tells_that_reading_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("broken by hand")

    monkeypatch.setattr("entropy_monitor.hooks.recorder.Recorder.attention", broken)
    text = first_step(tiny(), tmp_path / "run", ahead)
    assert "Reading failed ({'reading blocks.0'" in text
    assert "the log says why" in text


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ({"loss": torch.ones(3)}, r"loss must be a single number, got shape \[3\]"),
        ({"scalars": {"lr": "fast"}}, "lr must be a number, got str"),
        ({"step": 0.5}, r"step must be an integer, got 0\.5"),
    ],
)
def test_the_first_step_checks_its_arguments(call: dict[str, Any], text: str, tmp_path: Path) -> None:
    model, sink = tiny(), ListSink()
    monitor = EntropyMonitor(model, run_dir=tmp_path, loggers=[sink])
    ahead(model)
    with pytest.raises(ConfigurationError, match=text):
        monitor.step(**call)
    assert monitor.step(0.5).measured  # it may be called again, rightly
    monitor.close()
    assert len(sink.records) == 1


@pytest.mark.parametrize("state", [None, [], {}, {"version": 99}])
def test_a_state_that_is_none(state: Any, tmp_path: Path) -> None:
    monitor = EntropyMonitor(tiny(), run_dir=tmp_path)
    with pytest.raises(ConfigurationError, match="state is none that this package reads: its version is"):
        monitor.load_state_dict(state)
    monitor.close()


def test_errors_are_ours() -> None:
    for error in (ConfigurationError, AttentionNotFoundError, RunDirectoryError):
        assert issubclass(error, EntropyMonitorError)
    assert issubclass(ConfigurationError, ValueError)


def test_training_goes_on_beside_the_error_of_a_second_monitor(tmp_path: Path) -> None:
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with EntropyMonitor(model, optimizer=optimizer, run_dir=tmp_path / "a", every=1) as monitor:
        train(model, optimizer, 1, monitor.step)
        with pytest.raises(ConfigurationError):
            EntropyMonitor(model, every=-1)
        train(model, optimizer, 2, monitor.step)
        assert monitor.faults == {}
