from __future__ import annotations

import numpy as np
import pytest
import torch

from entropy_monitor import transfer
from entropy_monitor.hooks import FIGURES, Harvest
from entropy_monitor.hooks.recorder import HeadIndex
from entropy_monitor.hooks.weights import UPDATE_FIGURES
from entropy_monitor.records import HEADS, LAYERS
from entropy_monitor.scalars import ScalarBatch
from entropy_monitor.transfer import Transfer, fetch, pack

SCALARS = ScalarBatch(((4, "loss"), (5, "loss")), (0.1, 0.2))


class FakeEvent:
    """A copy that is done when it is told so, and notes who waits for it."""

    def __init__(self) -> None:
        self.done = False
        self.waits = 0

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.waits += not self.done
        self.done = True


def harvest(step: int = 5) -> Harvest:
    index = (HeadIndex("a", 0, 0, 2, "softmax"), HeadIndex("b", 1, 0, 1, "softmax"))
    figures = torch.arange(3.0 * len(FIGURES)).reshape(len(FIGURES), 3) + step
    return Harvest(step, index, figures, (("a", 0), ("b", 1)), torch.arange(8.0).reshape(2, 4), {})


UPDATES = 100 + torch.arange(2.0 * len(UPDATE_FIGURES)).reshape(2, -1)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[FakeEvent]:
    made: list[FakeEvent] = []

    def to_host(flat: torch.Tensor) -> tuple[torch.Tensor, FakeEvent]:
        made.append(FakeEvent())
        return flat.clone(), made[-1]

    monkeypatch.setattr(transfer, "_to_host", to_host)
    return made


def test_a_record_holds_every_figure_in_its_place() -> None:
    record = pack(5, SCALARS, harvest(), UPDATES).open()
    assert record.step == 5
    assert list(record.heads) == list(HEADS.names)
    assert record.heads["layer"] == ["a", "a", "b"]
    assert list(record.heads["head"]) == [0, 1, 0]
    for i, name in enumerate(FIGURES):
        np.testing.assert_array_equal(record.heads[name], harvest().figures[i].numpy(), err_msg=name)
    layers = torch.cat([harvest().sigmas, UPDATES], dim=1)
    for i, name in enumerate(LAYERS.names[3:]):
        np.testing.assert_array_equal(record.layers[name], layers[:, i].numpy(), err_msg=name)
    assert list(record.scalars["step"]) == [4, 5]
    assert list(record.scalars["value"]) == [0.1, 0.2]


def test_odd_bits_arrive_as_they_are() -> None:
    made = harvest()
    odd = torch.tensor([0x7FC00001, -0x400000, 0x7F800001, 1, -(2**31)], dtype=torch.int32)
    made.figures[1, :3] = odd[:3].view(torch.float32)
    made.sigmas[0, :2] = odd[3:].view(torch.float32)
    loss = torch.tensor(0.1, dtype=torch.float64)
    record = pack(
        5, ScalarBatch(((5, "loss"), (5, "n")), (loss, torch.tensor(2**53 - 1))), made, UPDATES
    ).open()
    assert record.scalars["value"].tolist() == [0.1, 2**53 - 1]  # type: ignore[union-attr]
    assert record.layers["sigma_q"][0] == np.float32(1e-45)
    assert np.signbit(record.layers["sigma_k"][0])
    np.testing.assert_array_equal(np.asarray(record.heads[FIGURES[1]]).view(np.int32), odd[:3].numpy())


def test_records_share_nothing() -> None:
    one, other = (pack(step, SCALARS, harvest(), UPDATES).open() for step in (5, 6))
    for table in ("heads", "layers"):
        for name, values in getattr(one, table).items():
            same = getattr(other, table)[name]
            assert same is not values
            if not isinstance(values, list):
                assert not np.shares_memory(values, same), name
    parcel = pack(5, SCALARS, harvest(), UPDATES)
    record = parcel.open()
    parcel.flat.zero_()  # page-locked memory that goes back
    assert all(np.any(record.heads[name]) for name in FIGURES)


def test_rows_of_ranks_and_calls_are_in_their_places() -> None:
    index = (
        HeadIndex("a", 0, 0, 2, "softmax", 4),
        HeadIndex("b", 3, 0, 1, "relu"),
        HeadIndex("a", 0, 1, 2, "x"),
    )
    made = Harvest(5, index, torch.zeros(len(FIGURES), 5), (("a", 0), ("b", 3)), torch.zeros(2, 4), {})
    heads = pack(5, SCALARS, made, UPDATES).open().heads
    rows = list(zip(*(heads[n] for n in ("layer", "layer_index", "call", "head", "attention")), strict=True))
    assert rows == [
        ("a", 0, 0, 4, "softmax"),
        ("a", 0, 0, 5, "softmax"),
        ("b", 3, 0, 0, "relu"),
        ("a", 0, 1, 0, "x"),
        ("a", 0, 1, 1, "x"),
    ]
    assert list(heads["step"]) == [5] * 5


def test_scalars_alone_make_a_record_without_rows() -> None:
    record = pack(5, SCALARS).open()
    assert {len(c) for c in record.heads.values()} == {0}
    assert {len(c) for c in record.layers.values()} == {0}
    assert list(record.scalars["value"]) == [0.1, 0.2]


def test_scalars_on_a_device_travel_with_the_figures() -> None:
    batch = ScalarBatch(((4, "loss"), (4, "lr"), (5, "loss")), (torch.tensor(0.5), 0.1, torch.tensor(0.25)))
    assert list(pack(5, batch, harvest(), UPDATES).open().scalars["value"]) == [0.5, 0.1, 0.25]
    assert list(pack(5, batch).open().scalars["value"]) == [0.5, 0.1, 0.25]


def test_nothing_waits_for_a_copy_under_way(events: list[FakeEvent]) -> None:
    carrier = Transfer()
    for step in range(3):
        carrier.send(pack(step, SCALARS, harvest(step), UPDATES))
    assert list(carrier.receive()) == []
    events[1].done = True  # not the oldest: order is kept
    assert list(carrier.receive()) == []
    events[0].done = True
    assert [record.step for _, record in carrier.receive()] == [0, 1]
    assert [event.waits for event in events] == [0, 0, 0]


def test_waiting_receives_everything(events: list[FakeEvent]) -> None:
    carrier = Transfer()
    for step in range(3):
        carrier.send(pack(step, SCALARS, harvest(step), UPDATES))
    got = list(carrier.receive(wait=True))
    assert [record.step for _, record in got] == [0, 1, 2]
    assert [h.step for h, _ in got if h is not None] == [0, 1, 2]
    assert [event.waits for event in events] == [1, 1, 1]
    assert list(carrier.receive(wait=True)) == []


def test_figures_are_those_at_the_time_of_packing(events: list[FakeEvent]) -> None:
    made = harvest()
    parcel = pack(5, SCALARS, made, UPDATES)
    expected = made.figures.numpy().copy()
    made.figures.fill_(-1.0)
    np.testing.assert_array_equal(parcel.open().heads["entropy"], expected[FIGURES.index("entropy")])


def test_a_parcel_that_cannot_be_opened_costs_itself_only(
    events: list[FakeEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    carrier = Transfer()
    for step in range(3):
        carrier.send(pack(step, SCALARS, harvest(step), UPDATES))
    monkeypatch.setattr(events[1], "synchronize", lambda: 1 / 0)
    arriving = carrier.receive(wait=True)
    assert next(arriving)[1].step == 0
    with pytest.raises(ZeroDivisionError):
        next(arriving)
    assert [record.step for _, record in carrier.receive(wait=True)] == [2]


def test_fetch_on_the_host() -> None:
    assert fetch(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_copies_without_a_wait() -> None:
    device = torch.device("cuda")
    made = harvest()
    on_device = Harvest(5, made.index, made.figures.to(device), made.layers, made.sigmas.to(device), {})
    updates, loss = UPDATES.to(device), torch.tensor(0.5, device=device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(200_000_000)
        parcel = pack(5, ScalarBatch(((5, "loss"),), (loss,)), on_device, updates)
        assert not parcel.arrived
    finally:
        torch.cuda.set_sync_debug_mode("default")
    record = parcel.open()
    np.testing.assert_array_equal(record.heads["entropy"], made.figures[FIGURES.index("entropy")].numpy())
    assert list(record.scalars["value"]) == [0.5]
