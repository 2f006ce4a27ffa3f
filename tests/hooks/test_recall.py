"""A forward that is not followed gives the figures that it gives when it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from entropy_monitor.guard import Guard
from entropy_monitor.hooks import Harvest, Recorder, Watcher
from entropy_monitor.hooks.observer import Observer
from tests.hooks.test_zoo import built
from tests.training import FusedAttention, SeparateAttention, TorchAttention
from tests.zoo import ZOO

X = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0))


class Reader:
    """Reads forwards of a model, followed or not, and counts the functions that were looked at."""

    def __init__(self, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recorder = Recorder("all")
        self.guard = Guard()
        self.watcher = Watcher(model, self.recorder, self.guard)
        self.model, self.looked = model, 0
        after = Observer.after

        def counted(observer: Observer, *args: Any) -> None:
            self.looked += 1
            after(observer, *args)

        monkeypatch.setattr(Observer, "after", counted)

    def read(self, *inputs: Any, rows_alone: bool) -> Harvest:
        self.looked = 0
        self.recorder.begin(0, in_full=not rows_alone)
        self.watcher.rows_alone = rows_alone
        self.watcher.arm()
        try:
            self.model(*inputs)
        finally:
            self.watcher.disarm()
        return self.recorder.harvest()


@pytest.mark.parametrize("name", ZOO)
def test_every_model_reads_as_when_followed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = built(ZOO[name])
    reader = Reader(model.eval(), monkeypatch)
    with torch.no_grad():
        followed, recalled = (reader.read(*inputs, rows_alone=alone) for alone in (False, True))
    assert recalled.index == followed.index
    torch.testing.assert_close(recalled.figures[:6], followed.figures[:6], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("block", [SeparateAttention, TorchAttention])
def test_no_function_is_looked_at(block: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader(nn.Sequential(block(), block()), monkeypatch)
    reader.read(X, rows_alone=False)
    assert reader.looked
    reader.read(X, rows_alone=True)
    assert not reader.looked
    assert not reader.guard.faults


def test_attention_by_hand_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader(nn.Sequential(SeparateAttention(), FusedAttention()), monkeypatch)
    reader.read(X, rows_alone=False)
    assert len(reader.read(X, rows_alone=True).index) == 2
    assert reader.looked


class Dropping(nn.Module):
    """Layers of which some are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SeparateAttention() for _ in range(3))
        self.used = [0]

    def forward(self, x: Tensor) -> Tensor:
        for i in self.used:
            x = x + self.layers[i](x)
        return x


def test_layers_that_are_left_out_shift_no_names(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Dropping()
    reader = Reader(model, monkeypatch)
    for used in ([0, 1], [2]):
        model.used = used
        reader.read(X, rows_alone=False)
    for used in ([2], [1, 2], [0, 1, 2, 1]):
        model.used = used
        found = {(i.layer, i.call) for i in reader.read(X, rows_alone=True).index}
        assert not reader.looked
        assert found == {(f"layers.{i}", used[:n].count(i)) for n, i in enumerate(used)} - {("layers.1", 1)}


def test_what_was_never_followed_is_not_read_three_times_and_then_followed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Dropping()
    reader = Reader(model, monkeypatch)
    reader.read(X, rows_alone=False)
    model.used = [0, 1]
    for _ in range(3):
        assert [i.layer for i in reader.read(X, rows_alone=True).index] == ["layers.0"]
    assert [i.layer for i in reader.read(X, rows_alone=True).index] == ["layers.0", "layers.1"]


def test_a_layer_of_another_form_is_not_taken_for_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    class Changing(SeparateAttention):
        def forward(self, x: Tensor) -> Tensor:
            if not wide:
                return super().forward(x)
            y: Tensor = torch.nn.functional.scaled_dot_product_attention(*(x.unflatten(-1, (4, -1)),) * 3)
            return y.flatten(2)

    wide = False
    reader = Reader(nn.Sequential(SeparateAttention(), Changing()), monkeypatch)
    reader.read(X, rows_alone=False)
    wide = True
    assert [i.layer for i in reader.read(X, rows_alone=True).index] == ["0"]
