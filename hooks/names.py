"""Qualified names of modules, as the user wrote them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

# What wrappers put between the user's names: DistributedDataParallel, torch.compile, checkpoint wrappers.
_WRAPPERS = frozenset({"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def clean_name(name: str) -> str:
    """Drop what wrappers add: `module.blocks.0._orig_mod.attn` is `blocks.0.attn`.

    Only a leading `module` is a wrapper's; deeper ones may be the user's own.
    """
    parts = name.split(".")
    kept = [
        part
        for i, part in enumerate(parts)
        if part not in _WRAPPERS or (part == "module" and any(p not in _WRAPPERS for p in parts[:i]))
    ]
    return ".".join(kept)


def module_names(model: nn.Module) -> dict[nn.Module, str]:
    """The clean qualified name of every module; the model itself goes by its class name."""
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        names[module] = clean_name(name) or type(module).__name__
    return names


def parameter_shapes(model: nn.Module) -> dict[str, list[int]]:
    """Clean parameter name to shape: what makes two models the same to a run directory."""
    whole = dict(_unflattened(model))
    return {clean_name(name): list(whole.get(p, p.shape)) for name, p in model.named_parameters()}


def _unflattened(model: nn.Module) -> Iterator[tuple[nn.Parameter, torch.Size]]:
    """Parameters of which FSDP1 leaves a process a flat part, another one on each, with their shapes."""
    for module in model.modules():
        flat = getattr(module, "_flat_param", None)
        yield from zip(getattr(flat, "_params", None) or (), getattr(flat, "_shapes", ()), strict=False)
