from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from entropy_monitor.hooks.visibility import Visibility


class Operators(TorchDispatchMode):
    """Remembers what torch was asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_words_are_found_without_torch() -> None:
    """They are found on a thread of their own, where torch would slow the training down."""
    rows = torch.arange(0, 512, 8)
    causal = (torch.arange(512) <= rows[:, None]).expand(4, -1, -1).clone()
    padded = causal.clone()
    padded[1, :, :100] = False
    with Operators() as operators:
        words = [Visibility("", seen, rows, 512).in_words() for seen in (causal, padded)]
        assert set(operators.names) <= {"aten.detach.default"}, operators.names
        torch.equal(causal, padded)
        assert "aten.equal.default" in operators.names  # it would be seen
    assert words == ["causal", "causal + padding"]
