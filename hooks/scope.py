"""The forwards of modules that are running, and the linear maps that ran in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from entropy_monitor.hooks.linears import LinearCall

_TORCH_MODULES = "torch.nn.modules."
_CONTAINERS = (
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)
_HEAD_ATTRIBUTES = (
    "num_heads",
    "n_heads",
    "n_head",
    "num_attention_heads",
    "nhead",
    "heads",
    "nheads",
    "n_attn_heads",
    "h",
)
NEAR = 2  # the module that called attention, and the one around it


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is one of torch's own layers (Linear, Softmax, Dropout, …), which own no attention."""
    if isinstance(module, _CONTAINERS):
        return False
    return any(
        c.__module__.startswith(_TORCH_MODULES) for c in type(module).__mro__[:-1] if c is not nn.Module
    )


@dataclass(eq=False)
class Scope:
    """The forward of one module that is no torch layer.

    Attributes:
        module: whose forward it is.
        parent: the forward that it runs in.
        linears: linear maps that ran in it and still hold their inputs.
    """

    module: nn.Module
    parent: Scope | None = None
    linears: list[LinearCall] = field(default_factory=list)

    def close(self) -> None:
        """At the end of the forward: let the linear maps' inputs go.

        A module without children (a projection of the user's own) leaves them to its caller.
        """
        if self.parent is not None and next(self.module.children(), None) is None:
            self.parent.linears += self.linears
            return
        for linear in self.linears:
            linear.release()

    def running(self, scopes: Sequence[Scope]) -> Scope:
        """This scope if it is among `scopes`, which are running, or else the nearest around it that is."""
        scope = self
        while scope not in scopes and scope.parent is not None:
            scope = scope.parent
        return scope


def declared_heads(scopes: Sequence[Scope]) -> int | None:
    """How many heads the running modules say they have, by the attribute names in common use."""
    for scope in reversed(scopes[-NEAR:]):
        for name in _HEAD_ATTRIBUTES:
            value = getattr(scope.module, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return None
