"""A forward that is not followed gives the figures that it gives when it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from entropy_monitor.guard import Guard
from entropy_monitor.hooks import Harvest, Recorder, Watcher
from entropy_monitor.hooks.observer import Observer
from entropy_monitor.hooks.recall import Followed, Known
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


def test_after_what_was_never_followed_the_next_forward_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Dropping()
    reader = Reader(model, monkeypatch)
    reader.read(X, rows_alone=False)
    model.used = [0, 1]
    assert [i.layer for i in reader.read(X, rows_alone=True).index] == ["layers.0"]
    assert [i.layer for i in reader.read(X, rows_alone=True).index] == ["layers.0", "layers.1"]
    assert reader.looked
    assert [i.layer for i in reader.read(X, rows_alone=True).index] == ["layers.0", "layers.1"]
    assert not reader.looked


def test_a_forward_that_differs_again_and_again_is_always_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Dropping()
    reader = Reader(model, monkeypatch)
    reader.read(X, rows_alone=False)
    for repeats in (2, 3, 4):
        model.used = [0] * repeats
        reader.read(X, rows_alone=True)
        assert not reader.looked
        reader.read(X, rows_alone=True)
        assert reader.looked
    reader.read(X, rows_alone=True)
    assert reader.looked


class Core(nn.Module):
    """Attention that several layers share."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y: Tensor = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return y


class Sharing(nn.Module):
    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.qkv, self.core = nn.Linear(8, 24), core

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return x + self.core(q, k, v).transpose(1, 2).flatten(2)


def test_layers_that_share_their_attention_keep_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    core, model = Core(), Dropping()
    model.layers = nn.ModuleList(Sharing(core) for _ in range(3))
    reader = Reader(model, monkeypatch)
    for used in ([0, 1], [1, 2], [0, 2]):
        model.used = used
        reader.read(X, rows_alone=False)
    for used in ([1, 2], [0, 1, 2], [2, 0]):
        model.used = used
        found = {i.layer for i in reader.read(X, rows_alone=True).index}
        assert found == {f"layers.{i}" for i in used}


def test_a_place_that_was_several_layers_tells_nothing() -> None:
    place = (nn.Identity(),), 0
    first, same, other = (
        Followed({place: Known("scaled_dot_product_attention", (2, 4, 2), layer, 0)}) for layer in "aab"
    )
    found = Followed()
    found.add(first)
    found.add(same)
    assert found.tells
    found.add(other)
    assert not found.tells


@pytest.mark.parametrize("by_hand", [True, False])
def test_attention_that_becomes_another_is_read_again(by_hand: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Either(SeparateAttention):
        def forward(self, x: Tensor) -> Tensor:
            if not changed:
                return super().forward(x)
            q, k, v = (m(x).unflatten(-1, (2, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
            logits = q @ k.mT / 2
            maps = logits.softmax(-1) if by_hand else logits.relu() / logits.relu().sum(-1, keepdim=True)
            return self.o((maps @ v).transpose(1, 2).flatten(2))

    changed = False
    reader = Reader(nn.Sequential(Either(), Either()), monkeypatch)
    reader.read(X, rows_alone=False)
    reader.read(X, rows_alone=True)
    assert not reader.looked
    changed = True
    with pytest.raises(IndexError):  # nothing was read: there are no figures
        reader.read(X, rows_alone=True)
    assert len(reader.read(X, rows_alone=True).index) == 2


def test_a_layer_that_fails_costs_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader(nn.Sequential(*(SeparateAttention() for _ in range(3))), monkeypatch)
    reader.read(X, rows_alone=False)
    read = reader.recorder.attention

    def fails(call: Any) -> None:
        if call.layer == "1":
            raise MemoryError("no memory")
        read(call)

    monkeypatch.setattr(reader.recorder, "attention", fails)
    for _ in range(6):
        assert [i.layer for i in reader.read(X, rows_alone=True).index] == ["0", "2"]
    assert dict(reader.guard.faults) == {"reading 1": 3}


def test_calls_after_an_unknown_one_are_not_numbered_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(SeparateAttention):
        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x).unflatten(-1, (heads, -1)).transpose(1, 2)
            first: Tensor = torch.nn.functional.scaled_dot_product_attention(q, q, q)
            return super().forward(first.transpose(1, 2).flatten(2))

    heads = 2
    reader = Reader(nn.Sequential(Twice(), SeparateAttention()), monkeypatch)
    reader.read(X, rows_alone=False)
    heads = 4
    with pytest.raises(IndexError):
        reader.read(X, rows_alone=True)
    index = reader.read(X, rows_alone=True).index
    assert [(i.layer, i.call) for i in index] == [("0", 0), ("0", 1), ("1", 0)]


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
