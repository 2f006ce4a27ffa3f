"""Which attention layers a remedy is for, where these are only known once they ran."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.hooks import module_names
from entropy_monitor.hooks.structure import attention_owners, is_within, whole_model
from entropy_monitor.remedies.selection import Layers, is_known_kind


class AttentionChoice:
    """Tells of an attention layer, when it runs, whether it is chosen.

    A pattern chooses the attention layers that it names, those in a module of attention that it names
    (`layer.0.attention` around `layer.0.attention.self`), and those that own a linear layer that it names. A
    function is asked for the name and the module of each attention layer, once.

    Args:
        model: whose layers.
        layers: "all" or "attention", which are the same here, a name pattern, a list of them, or a function.
        remedy: what is to be done, for errors.

    Attributes:
        asked: attention layers that ran, and whether they are chosen.

    Raises:
        ConfigurationError: if the choice is of another kind, empty, or a pattern names no module.
    """

    def __init__(self, model: nn.Module, layers: Layers, remedy: str) -> None:
        self.asked: dict[str, bool] = {}
        self._layers = layers
        if isinstance(layers, (nn.Module, type)) or not (
            callable(layers) or isinstance(layers, str) or _is_list_of_names(layers)
        ):
            got = type(layers).__name__ if isinstance(layers, nn.Module) else repr(layers)
            raise ConfigurationError(
                f"{remedy}: layers must be 'all', 'attention', a name pattern of attention layers or a list "
                f"of at least one, or a function of name and module, got {got}"
            )
        names = module_names(model)
        self._modules = {name: module for module, name in names.items()}
        if callable(layers):
            return
        everything = isinstance(layers, str) and layers in {"all", "attention"}
        self._patterns = ("*",) if everything else (layers,) if isinstance(layers, str) else tuple(layers)
        self._roots = whole_model(model)
        owners = attention_owners(model)
        for pattern in self._patterns:
            if not any(fnmatchcase(name, pattern) for name in self._modules):
                some = (
                    f"its attention is {_shown(owners)}"
                    if owners
                    else f"it has {_shown(list(self._modules))}"
                )
                raise ConfigurationError(
                    f"{remedy}: layers: no module is named {pattern!r}; {some}. Name attention layers, or "
                    "linear layers within them"
                )
        self._owners = [name for name in owners if name not in self._roots]
        self._linears = [name for module, name in names.items() if is_known_kind(module)]

    def __call__(self, layer: str) -> bool:
        """Whether an attention layer is chosen."""
        if layer not in self.asked:
            self.asked[layer] = self._answer(layer)
        return self.asked[layer]

    def __str__(self) -> str:
        name = getattr(self._layers, "__name__", None) if callable(self._layers) else None
        return f"layers={name or repr(self._layers)}"

    def _answer(self, layer: str) -> bool:
        if callable(self._layers):
            return bool(self._layers(layer, self._modules[layer]))
        around = [owner for owner in self._owners if is_within(layer, owner, self._roots)]
        own = [linear for linear in self._linears if self._owns(layer, linear)]
        return any(fnmatchcase(name, p) for p in self._patterns for name in (layer, *around, *own))

    def _owns(self, layer: str, linear: str) -> bool:
        if not is_within(linear, layer, self._roots):
            return False
        # Attention in the model's own forward does not own the layers of its blocks.
        return layer not in self._roots or not any(
            linear == owner or is_within(linear, owner, self._roots) for owner in self._owners
        )


def _is_list_of_names(layers: object) -> bool:
    return isinstance(layers, Sequence) and len(layers) > 0 and all(isinstance(p, str) for p in layers)


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
