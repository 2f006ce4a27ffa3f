"""Attention in float32 within mixed precision: its operands, logits and softmax, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.hooks import module_names
from entropy_monitor.hooks.structure import attention_owners, is_within, whole_model
from entropy_monitor.remedies.float32_operands import Float32Operands
from entropy_monitor.remedies.selection import Layers, as_patterns, shown

_REMEDY = "fp32_attention"
_KERNELS = ("flash", "flex", "paged")


class _InFloat32:
    """The forward of a module, within the mode; an attribute of the module, and copied with it.

    Args:
        module: whose forward.
        passive: see `Float32Operands`.
    """

    def __init__(self, module: nn.Module, passive: bool) -> None:
        self.module = module
        self.passive = passive
        self.inner = module.__dict__.get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        mode = Float32Operands()
        mode.passive = self.passive
        with mode:
            if self.inner is not None:
                out = self.inner(*args, **kwargs)
            else:
                out = type(self.module).forward(self.module, *args, **kwargs)
        return out if mode.lower is None else _back(out, mode.lower)


class AttentionPrecision:
    """Undoes `fp32_attention`: call `remove()`, or use it as a context manager.

    Attributes:
        layers: names of the modules whose attention runs in float32.
    """

    def __init__(self, layers: Sequence[str], modules: Sequence[nn.Module]) -> None:
        self.layers = tuple(layers)
        self._modules = tuple(modules)

    def remove(self) -> None:
        """Have attention run as it did before. Twice does no harm."""
        for module in self._modules:
            wrapped = module.__dict__.get("forward")
            if isinstance(wrapped, _InFloat32):
                del module.__dict__["forward"]
                if wrapped.inner is not None:
                    module.__dict__["forward"] = wrapped.inner

    def __enter__(self) -> AttentionPrecision:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def fp32_attention(model: nn.Module, layers: Layers = "attention") -> AttentionPrecision:
    """Compute attention in float32 where a model otherwise runs in bfloat16 or float16 (Zhai et al. 2023).

    Queries, keys and values enter the products in float32, the softmax is float32, autocast is off there,
    and what comes out has the dtype that it would have had. Linear layers, projections too, run as before.
    Under autocast and for models whose weights are bfloat16; `F.scaled_dot_product_attention`,
    `nn.MultiheadAttention` (its fast path and those of torch's encoder layers are not taken), and attention
    written by hand with `@`, `matmul`, `bmm`, `baddbmm` or `einsum` and a softmax. What the model's own
    code rounds in between stays rounded. In float32 it changes nothing.

    Not covered: FlexAttention, which is refused, and the kernels of flash-attn and xformers, which take no
    float32; `baddbmm_` in place, and products that write to `out=`. Give the model another implementation,
    such as `attn_implementation="sdpa"`.

    It works under activation checkpointing, `torch.compile` (without a break; better applied before), and
    in copies of the model. State dicts stay as they are.

    Args:
        model: whose attention modules get a forward of their own.
        layers: "attention" or "all" for all modules that compute attention, name patterns of such modules,
            or a function of name and module.

    Returns:
        What undoes it.

    Raises:
        ConfigurationError: if nothing matches, it is in place already, or the model says that it uses a
            kernel that is not covered. The model is left as it was.
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"{_REMEDY}: model must be a torch.nn.Module, got {type(model).__name__}")
    names = module_names(model)
    chosen = _chosen(model, layers, names)
    for module, name in chosen.items():
        if isinstance(module.__dict__.get("forward"), _InFloat32):
            raise ConfigurationError(f"{_REMEDY}: attention of {name} runs in float32 already")
        kernel = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if isinstance(kernel, str) and any(word in kernel for word in _KERNELS):
            raise ConfigurationError(
                f"{_REMEDY}: {name} uses {kernel}, which cannot run in float32 here; load the model with "
                "attn_implementation='sdpa'"
            )
    roots = whole_model(model)
    around = [
        module
        for module, name in names.items()
        if isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer))
        and module not in chosen
        and any(is_within(inner, name, roots) for inner in chosen.values())
        and not isinstance(module.__dict__.get("forward"), _InFloat32)
    ]
    for module in (*chosen, *around):
        object.__setattr__(module, "forward", _InFloat32(module, module not in chosen))
    return AttentionPrecision(list(chosen.values()), [*chosen, *around])


def _chosen(model: nn.Module, layers: Layers, names: dict[nn.Module, str]) -> dict[nn.Module, str]:
    kind = type(model).__name__
    if isinstance(layers, str) and layers in ("attention", "all"):
        owners = set(attention_owners(model))
        found = {module: name for module, name in names.items() if name in owners}
        if not found:
            raise ConfigurationError(
                f"{_REMEDY}: no module of {kind} looks like attention; name those that compute it: layers=[…]"
            )
        return found
    if callable(layers):
        found = {module: name for module, name in names.items() if layers(name, module)}
        if not found:
            raise ConfigurationError(f"{_REMEDY}: layers={shown(layers)} chose no module of {kind}")
        return found
    patterns = as_patterns(layers, _REMEDY, "'attention'")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names.values()):
            owned = attention_owners(model)
            has = f"; its attention is in {', '.join(owned[:5])}, …" if owned else ""
            raise ConfigurationError(f"{_REMEDY}: layers={pattern!r} matches no module of {kind}{has}")
    return {m: name for m, name in names.items() if any(fnmatchcase(name, p) for p in patterns)}


def _back(out: Any, lower: torch.dtype) -> Any:
    """What a module returns, in the dtype that it would have had: what stayed float32 and was not used on."""
    if isinstance(out, Tensor):
        if out.dtype != torch.float32 or torch.is_autocast_enabled(out.device.type):
            return out
        return out.to(lower)
    if type(out) in (tuple, list):
        return type(out)([_back(x, lower) for x in out])
    return out
