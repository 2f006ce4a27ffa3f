from __future__ import annotations

import gc
import json
import math
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.records import SCALARS
from entropy_monitor.scalars import ScalarBatch, ScalarLog, check_scalars, stacked


def test_numbers_of_every_kind_in_order() -> None:
    log = ScalarLog()
    log.add(0, torch.tensor(1.5), {"lr": 0.1, "tokens": 7})
    log.add(1, torch.tensor([2.5], requires_grad=True), {"acc": np.float32(0.25), "n": np.int64(3)})
    log.add(2, np.array(3.5), {"x": np.array([[4.5]]), "half": torch.tensor(0.5, dtype=torch.bfloat16)})
    log.add(3, None, None)
    assert len(log) == 9
    columns = log.take().columns([])
    assert columns["step"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert columns["name"] == ["loss", "lr", "tokens", "loss", "acc", "n", "loss", "x", "half"]
    assert columns["value"].tolist() == [1.5, 0.1, 7, 2.5, 0.25, 3, 3.5, 4.5, 0.5]
    assert len(log) == 0
    assert log.take() == ScalarBatch()


def test_the_graph_is_not_kept() -> None:
    x = torch.ones(1000, requires_grad=True)
    hidden = x * 2
    alive = weakref.ref(hidden)
    loss = hidden.square().sum()
    log = ScalarLog()
    log.add(0, loss, None)
    del hidden, loss
    gc.collect()
    assert alive() is None
    assert log.take().values == (4000.0,)


def test_values_are_those_at_the_time_of_adding() -> None:
    loss, log = torch.tensor(1.0), ScalarLog()
    log.add(0, loss, None)
    loss.fill_(9.0)
    assert log.take().values == (1.0,)


def test_values_on_a_device_keep_their_place() -> None:
    rows = ((0, "loss"), (0, "lr"), (1, "loss"), (1, "lr"))
    batch = ScalarBatch(rows, (torch.tensor(0.0), 0.1, torch.tensor(0.0), 0.2))
    assert len(batch.tensors) == 2
    columns = batch.columns([5.0, 6.0])
    assert columns["value"].tolist() == [5.0, 0.1, 6.0, 0.2]
    assert columns["name"] == ["loss", "lr", "loss", "lr"]


def test_no_scalars_are_an_empty_table() -> None:
    columns = ScalarBatch().columns([])
    assert list(columns) == list(SCALARS.names)
    assert all(len(c) == 0 for c in columns.values())


def test_stacked_keeps_values() -> None:
    tensors: list[Tensor] = [torch.tensor(2**30 + 1), torch.tensor(0.5, dtype=torch.bfloat16)]
    assert stacked(tensors, torch.device("cpu"), torch.float64).tolist() == [2**30 + 1, 0.5]
    assert stacked([], torch.device("cpu"), torch.float64).shape == (0,)


def test_state_is_strict_json_and_exact() -> None:
    log, again = ScalarLog(), ScalarLog()
    log.add(3, 0.1 + 0.2, {"nan": math.nan, "inf": -math.inf})
    again.load_state_dict(json.loads(json.dumps(log.state_dict(), allow_nan=False)))
    one, two = log.take(), again.take()
    assert one.rows == two.rows
    np.testing.assert_array_equal(one.values, two.values)


@pytest.mark.parametrize(
    ("loss", "scalars", "text"),
    [
        (torch.ones(2, 3), None, r"loss must be a single number, got shape \[2, 3\]: pass its mean"),
        (np.ones(4), None, r"loss must be a single number, got shape \[4\]: pass its mean"),
        ("0.5", None, "loss must be a number, got str"),
        (None, {"lr": [0.1]}, "lr must be a number, got list"),
        (None, {"lr": None}, "lr must be a number, got NoneType"),
        (None, [("lr", 0.1)], "scalars must be a dict from name to number, got list"),
        (None, {3: 0.1}, "names in scalars must be texts, got 3"),
        (0.5, {"loss": 0.1}, "scalars holds 'loss', which is given as the loss too: rename or drop one"),
        (torch.tensor(1j), None, "loss must be a real number, got dtype torch.complex64"),
        (np.array("x"), None, "loss must be a real number, got dtype <U1"),
        (1j, None, "loss must be a number, got complex"),
    ],
)
def test_what_is_no_number(loss: object, scalars: object, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        check_scalars(loss, scalars)


@pytest.mark.parametrize(
    "loss", [1, 0.5, True, np.float16(1), np.bool_(True), np.array([1]), torch.tensor(True)]
)
def test_what_is_one(loss: object) -> None:
    check_scalars(loss, {"x": loss})
