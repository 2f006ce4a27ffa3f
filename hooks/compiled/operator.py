"""The operator that reads inside compiled code, and the plans that it serves."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from entropy_monitor.hooks.compiled.plan import Plan

Read = Callable[[Plan, Sequence[Tensor | None], Sequence[int]], None]

_AUTOGRAD = ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView")
_plans: dict[int, Plan] = {}
_readers: dict[int, Read] = {}  # of the armed watchers

_library = torch.library.Library("entropy_monitor", "DEF")  # type: ignore[no-untyped-call]
_tags = [
    getattr(torch.Tag, name)
    for name in ("needs_exact_strides", "cudagraph_unsafe")
    if hasattr(torch.Tag, name)
]
_library.define("read(int plan, Tensor?[] tensors, SymInt[] sizes, str code='') -> ()", tags=tuple(_tags))  # type: ignore[no-untyped-call]


def _run(plan: int, tensors: list[Tensor | None], sizes: list[int], code: str = "") -> None:
    known = _plans.get(plan)
    if known is None or not _readers:
        return
    # As outside of an operator, where there is autograd, which vmap asks for.
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for name in _AUTOGRAD:
        exclude = exclude.remove(getattr(torch._C.DispatchKey, name))
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.no_grad():
        if code:
            tensors, sizes = _function(code)(*tensors, *sizes)
        for read in list(_readers.values()):
            read(known, tensors, sizes)


@functools.cache
def _function(code: str) -> Callable[..., Any]:
    """What makes a call's tensors and sizes of what the operator is given: code that `partition` wrote."""
    names = {"torch": torch, "device": torch.device, "inf": math.inf, "nan": math.nan}
    exec(code, names)  # noqa: S102  ours
    made: Callable[..., Any] = names["forward"]  # type: ignore[assignment]
    return functools.partial(made, None)


def _run_fake(plan: int, tensors: list[Tensor | None], sizes: list[Any], code: str = "") -> None:
    """While a graph is compiled, nothing is read."""


_library.impl("read", _run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("entropy_monitor::read", _run_fake)

READ = torch.fx.node.has_side_effect(torch.ops.entropy_monitor.read.default)
"""Nothing uses its result: without the mark it would be left out as dead code."""


def register(plan: Plan) -> int:
    """Make a plan known to the operator; returns the key to call it with."""
    key = plan.key
    _plans[key] = plan
    return key


def plan_of(key: Any) -> Plan | None:
    """The plan of a key."""
    return _plans.get(key)


def listen(owner: object, read: Read | None) -> None:
    """Have a watcher's reader called from now on; None ends it."""
    if read is None:
        _readers.pop(id(owner), None)
    else:
        _readers[id(owner)] = read
