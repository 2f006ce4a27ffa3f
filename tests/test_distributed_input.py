"""What raises in one process warns in one of several, where the other ranks would wait for it for ever."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from entropy_monitor import AttentionNotFoundError, ConfigurationError, EntropyMonitor
from entropy_monitor import options as opt
from entropy_monitor.records import Sink
from tests.training import TOKENS, WIDTH, ListSink, tiny

Ranks = Callable[..., None]


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    """Be one of several processes, as far as torch tells; nothing is sent anywhere."""
    store = dist.HashStore()

    def become(size: int, rank: int = 0, initialized: bool = True, available: bool = True) -> None:
        def asked_too_early() -> int:
            raise ValueError(
                "Default process group has not been initialized, please call init_process_group."
            )

        monkeypatch.setattr(dist, "is_available", lambda: available)
        monkeypatch.setattr(dist, "is_initialized", lambda: initialized)
        monkeypatch.setattr(dist, "get_world_size", (lambda: size) if initialized else asked_too_early)
        monkeypatch.setattr(dist, "get_rank", (lambda: rank) if initialized else asked_too_early)
        monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)

    return become


def without_attention() -> nn.Module:
    """A rank's part of a pipeline."""
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())


def batch() -> torch.Tensor:
    return torch.randn(2, TOKENS, WIDTH)


# Before training


def test_a_part_without_attention_passes_on_one_of_several_ranks(ranks: Ranks) -> None:
    ranks(2)
    opt.check_attention(without_attention(), (), None)


@pytest.mark.parametrize(
    "alone",
    [{"size": 1}, {"size": 2, "initialized": False}, {"size": 2, "available": False}],
    ids=["one rank", "not initialized", "not built in"],
)
def test_a_model_without_attention_is_refused_otherwise(alone: dict[str, int], ranks: Ranks) -> None:
    ranks(**alone)
    with pytest.raises(AttentionNotFoundError, match="Sequential has no attention"):
        opt.check_attention(without_attention(), (), None)


def test_other_mistakes_raise_on_every_rank(ranks: Ranks) -> None:
    """All ranks make them: none is left waiting. An example that shows no attention was asked for."""
    ranks(2, 1)
    with pytest.raises(ConfigurationError, match=r"no module is named 'mixer'"):
        opt.check_attention(tiny(), ["mixer"], None)
    with pytest.raises(AttentionNotFoundError, match="No attention was found in Sequential"):
        opt.check_attention(without_attention(), (), (batch(),))
    with pytest.raises(ConfigurationError, match=r"run_dir must be given in distributed training"):
        EntropyMonitor(tiny())


# At the end of the first step


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_without_attention_warns_and_goes_unwatched(
    rank: int, ranks: Ranks, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ranks(2, rank)
    model = without_attention()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = EntropyMonitor(model, optimizer=optimizer, run_dir=tmp_path / "run", every=1)
    for step in range(3):
        model(batch()).sum().backward()
        optimizer.step()
        report = monitor.step(0.5)
        assert (report.step, report.measured) == (0, False), step
    (told,) = warnings_of(caplog)
    assert told.startswith(
        "entropy-monitor: this rank is not watched. No attention was found in Sequential: "
    )
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert monitor.step(0.5, step=7).step == 7  # closed: says nothing any more
    assert monitor.faults == {}


def test_a_forgotten_forward_on_one_rank_says_so(
    ranks: Ranks, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ranks(2, 1)
    monitor = EntropyMonitor(tiny(), run_dir=tmp_path / "run")
    assert not monitor.step().measured
    (told,) = warnings_of(caplog)
    assert "this rank is not watched" in told
    assert "no forward of this model ran" in told


@pytest.mark.parametrize("alone", [{"size": 1}, {"size": 2, "initialized": False}], ids=["one", "none"])
def test_one_process_raises(alone: dict[str, int], ranks: Ranks, tmp_path: Path) -> None:
    monitor = EntropyMonitor(tiny(), run_dir=tmp_path / "run")
    ranks(**alone)
    with pytest.raises(AttentionNotFoundError, match="no forward of this model ran"):
        monitor.step()


def test_wrong_arguments_of_the_first_step_raise_on_every_rank(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2)
    with EntropyMonitor(tiny(), run_dir=tmp_path / "run") as monitor:
        with pytest.raises(ConfigurationError, match=r"loss must be a single number, got shape \[3\]"):
            monitor.step(torch.ones(3))
        with pytest.raises(ConfigurationError, match=r"step must be an integer, got 0\.5"):
            monitor.step(0.5, step=0.5)  # type: ignore[arg-type]


def test_a_rank_with_attention_is_watched(
    ranks: Ranks, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Beside the ranks that warn; loggers are rank 0's."""
    given = [ListSink(), ListSink()]
    for rank in (1, 0):
        ranks(2, rank)
        model = tiny()
        sinks: list[Sink] = [given[rank]]
        with EntropyMonitor(model, run_dir=tmp_path / str(rank), every=1, loggers=sinks) as monitor:
            model(batch()).sum().backward()
            assert monitor.step(0.5).measured
        assert monitor.faults == {}
    assert [len(sink.records) for sink in given] == [1, 0]
    assert warnings_of(caplog) == []
