"""Every test starts and ends without compiled code, and without a trace of ours in what compiles it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo import eval_frame
from torch._dynamo.output_graph import OutputGraph
from torch._dynamo.utils import counters
from torch.nn.modules import module as torch_module
from torch.overrides import _len_torch_function_stack

from entropy_monitor.monitor import _close_all

_CHOOSE, _COMPILE = eval_frame._callback_from_stance, OutputGraph.call_user_compiler


def left_behind() -> list[str]:
    """What a watcher has left in torch itself."""
    found = []
    if eval_frame._callback_from_stance is not _CHOOSE:
        found.append("eval_frame._callback_from_stance")
    if OutputGraph.call_user_compiler is not _COMPILE:
        found.append("OutputGraph.call_user_compiler")
    tables = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_forward_hooks_always_called")
    found += [name for name in tables if getattr(torch_module, name)]
    if _len_torch_function_stack():
        found.append("torch function modes")
    if torch._C._functorch.get_dynamic_layer_stack_depth():
        found.append("functorch layers")
    return found


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    left = left_behind()
    _close_all()  # of a test that failed, so that the next one does not
    torch.compiler.set_stance("default")
    torch.compiler.reset()
    assert left == []
