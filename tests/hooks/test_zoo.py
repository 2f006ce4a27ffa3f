"""Every figure of every model of the zoo against a dense float64 account of it."""

from __future__ import annotations

import pytest
import torch

import entropy_monitor as em
from tests.zoo import ZOO, Entry, figures

TOLERANCE = 2e-5


def built(entry: Entry):
    torch.manual_seed(0)
    model, *inputs = entry.build()
    return model.train(entry.train), inputs


@pytest.mark.parametrize("name", ZOO)
def test_every_column(name: str) -> None:
    model, inputs = built(ZOO[name])
    table = em.measure(model, *inputs)
    expected = ZOO[name].dense(model, *inputs)
    found = list(table.groupby(["layer", "call"], sort=False))
    assert [key for key, _ in found] == [(d.layer, d.call) for d in expected]
    for dense, (_, rows) in zip(expected, found, strict=True):
        for column, want in figures(dense).items():
            got = torch.tensor(rows[column].to_numpy(), dtype=torch.float64)
            if want is None:
                assert got.isnan().all(), f"{column}: {got} should be null"
            else:
                want = want.double()
                scale = want.abs().max().clamp(min=1)
                assert ((got - want).abs() <= TOLERANCE * scale).all(), f"{column}: {got}, want {want}"
