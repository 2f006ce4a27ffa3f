"""Models with attention pass, models without are refused, before anything runs."""

from __future__ import annotations

import pytest
from torch import nn

from entropy_monitor.hooks import attention_candidates
from tests.zoo import ZOO


@pytest.mark.parametrize("name", ZOO)
def test_every_model_with_attention_passes(name: str) -> None:
    assert attention_candidates(ZOO[name].build()[0])


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(5)),
        nn.LSTM(4, 4),
    ],
    ids=["mlp", "cnn", "lstm"],
)
def test_models_without_attention_are_refused(model: nn.Module) -> None:
    assert attention_candidates(model) == []
