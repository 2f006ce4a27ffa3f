"""Figures of one call over the micro-batches of a step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from entropy_monitor import measures
from entropy_monitor.hooks import recorder as recorder_module
from entropy_monitor.hooks.calls import AttentionCall, Inputs
from entropy_monitor.hooks.maps import evidence_map
from entropy_monitor.hooks.reading import FIGURES, CallReading
from entropy_monitor.hooks.recorder import Recorder

ENTROPY, ERROR = FIGURES.index("entropy"), FIGURES.index("entropy_se")


def call_of(q: Tensor, k: Tensor, layer: str = "a") -> AttentionCall:
    return AttentionCall(layer, 0, "sdpa", Inputs(q, k, None, True, 0.25), None, None, None)


def operands(batch: int, tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    q, k = (torch.randn(batch, 2, tokens, 16, generator=generator) for _ in range(2))
    return 2 * q, k


def read(parts: list[tuple[Tensor, Tensor]], count: int | None, step: int = 0) -> Tensor:
    reading = CallReading(call_of(*parts[0]))
    for q, k in parts:
        tokens = q.shape[2]
        rows = None if count is None or count >= tokens else measures.stratified_rows(tokens, count, step)
        reading.add(call_of(q, k), rows, None)
    return reading.figures()


def test_micro_batches_have_the_error_of_one_batch() -> None:
    q, k = operands(8, 64, torch.Generator().manual_seed(0))
    apart = read([(q[i : i + 1], k[i : i + 1]) for i in range(8)], 16)
    torch.testing.assert_close(apart[ERROR], read([(q, k)], 16)[ERROR])
    assert (apart[ERROR] < 0.6 * read([(q[:1], k[:1])], 16)[ERROR]).all()


@pytest.mark.parametrize("lengths", [[96] * 6, [96, 80, 64, 96, 112, 72], [96, 12, 96, 96], [300, 20]])
def test_errors_of_micro_batches_are_as_large_as_told(lengths: list[int]) -> None:
    g = torch.Generator().manual_seed(1)
    errors, estimates = [], []
    for step in range(60):
        parts = [operands(1, T, g) for T in lengths]
        got = read(parts, 16, step)
        errors.append(got[ENTROPY] - read(parts, None)[ENTROPY])
        estimates.append(got[ERROR])
    error, estimate = torch.stack(errors), torch.stack(estimates)
    assert (error.abs() <= 1.96 * estimate).float().mean() > 0.93
    assert estimate.square().mean().sqrt() < 1.6 * error.square().mean().sqrt()


def test_all_rows_leave_no_error() -> None:
    g = torch.Generator().manual_seed(1)
    assert (read([operands(2, 12, g), operands(2, 9, g)], None)[ERROR] == 0).all()


def test_a_map_that_fails_costs_the_map_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(call: AttentionCall) -> Tensor:
        raise RuntimeError("no deterministic implementation")

    monkeypatch.setattr(recorder_module, "evidence_map", fails)
    q, k = operands(1, 12, torch.Generator())
    reading = Recorder("all")
    reading.begin(3, suspects={"a"})
    with pytest.raises(RuntimeError):
        reading.attention(call_of(q, k))
    reading.attention(call_of(q, k))
    reading.attention(call_of(q, k, "b"))
    got = reading.harvest()
    assert [i.layer for i in got.index] == ["a", "b"]
    assert got.figures[FIGURES.index("rows_read")].tolist() == [24.0, 24.0, 12.0, 12.0]
    assert got.maps == {}


def test_a_call_that_cannot_be_entered_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(call: AttentionCall) -> CallReading:
        raise RuntimeError("out of memory")

    q, k = operands(1, 12, torch.Generator())
    reading = Recorder("all")
    monkeypatch.setattr(recorder_module, "CallReading", fails)
    with pytest.raises(RuntimeError):
        reading.attention(call_of(q, k))
    monkeypatch.undo()
    reading.attention(call_of(q, k))  # the rest would pass for all
    reading.attention(call_of(q, k, "b"))
    assert [i.layer for i in reading.harvest().index] == ["b"]


@pytest.mark.parametrize("tokens", [65, 100, 128, 200])
def test_pooled_maps_sum_keys_in_even_blocks(tokens: int) -> None:
    q, k = operands(1, tokens, torch.Generator().manual_seed(2))
    got = evidence_map(call_of(q, k))
    whole = measures.attention_map(q, k, is_causal=True, scale=0.25)[0]
    rows = [i * tokens // 64 for i in range(64)]
    want = torch.stack(
        [whole[:, rows, j * tokens // 64 : (j + 1) * tokens // 64].sum(-1) for j in range(64)], -1
    )
    torch.testing.assert_close(got, want)


def test_pooling_is_what_a_device_does_deterministically(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object, **kwargs: object) -> Tensor:
        raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")

    monkeypatch.setattr(torch.Tensor, "cumsum", refused)
    monkeypatch.setattr(torch, "cumsum", refused)
    q, k = operands(1, 100, torch.Generator().manual_seed(2))
    torch.testing.assert_close(evidence_map(call_of(q, k)).sum(-1), torch.ones(2, 64))
