"""Running a model's forward so that nothing of it stays: neither in the model nor in compiled code."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from entropy_monitor.hooks import is_compiled
from entropy_monitor.hooks.structure import compiled_in_place


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Put back what a forward may move: buffers, modes, attributes of modules, every random state.

    An attribute gets its old value back; what was changed inside that value stays changed.
    """
    kept = [_Kept(module) for module in model.modules()]
    values = {b: b.detach().clone() for b in model.buffers() if not is_lazy(b)}
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002  the state that models draw from
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        for module in kept:
            module.put_back()
        for buffer, value in values.items():
            if not torch.equal(buffer, value):  # a graph of the user's may hold those that did not change
                with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                    buffer.copy_(value)


class _Kept:
    """A module's attributes, mode and buffers (which tensors, not their values)."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._training = module.training
        self._buffers = None if isinstance(module, torch.jit.ScriptModule) else dict(module._buffers)
        # Not of torch's own modules: wrappers (FSDP) are set up by their first forward, outside their
        # attributes too, and so are lazy modules, whose very class changes.
        fixed = isinstance(module, (torch.jit.ScriptModule, LazyModuleMixin))
        fixed = fixed or type(module).__module__.startswith("torch.")
        self._attributes = None if fixed else dict(vars(module))

    def put_back(self) -> None:
        if self._attributes is not None:
            now = vars(self._module)
            for name in now.keys() - self._attributes.keys():
                del now[name]
            now.update(self._attributes)
        if self._buffers is not None:  # in their own dict, which others may hold
            self._module._buffers.clear()
            self._module._buffers.update(self._buffers)
        if self._module.training != self._training:
            self._module.training = self._training


@contextmanager
def run_eagerly(model: nn.Module) -> Iterator[None]:
    """Run a model whose modules are compiled as it was written; one that has none is left alone."""
    in_place = [module for module in model.modules() if compiled_in_place(module)]
    if not in_place and not any(map(is_compiled, model.modules())):
        yield
        return
    calls = [module._compiled_call_impl for module in in_place]
    for module in in_place:
        module._compiled_call_impl = None
    stance = getattr(torch.compiler, "set_stance", None)  # since torch 2.6
    try:
        with nullcontext() if stance is None else stance("force_eager"):
            yield
    finally:
        for module, call in zip(in_place, calls, strict=True):
            module._compiled_call_impl = call
