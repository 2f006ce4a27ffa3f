"""Training without layer norms: each is replaced by an identity, as in the paper's LayerNorm-free recipe."""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.hooks import module_names
from entropy_monitor.hooks.structure import attention_owners, is_within, whole_model
from entropy_monitor.remedies.selection import Layers
from entropy_monitor.remedies.wrapping import require_unwrapped

_REMEDY = "remove_layer_norms"
_NAMED = re.compile(r"(layer|rms)_?norm", re.IGNORECASE)


@dataclass(frozen=True)
class Removed:
    """Stands for the weight of a norm that is gone: models ask it which dtype to compute in.

    Code that would multiply by it, or hand it to a kernel that normalises, fails.
    """

    dtype: torch.dtype
    device: torch.device


class RemovedNorm(nn.Identity):
    """The identity that a norm was replaced by.

    Args:
        norm: that it stands for.

    Attributes:
        eps: NaN, which equals no other: it keeps `nn.TransformerEncoderLayer` in eval mode from a kernel that
            normalises by itself.
        bias: None.
    """

    _like: Tensor

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.eps = math.nan
        self.bias = None
        parameter = next(norm.parameters(), None)
        # Empty, and not in state dicts: it follows model.to(…).
        like = torch.empty(0) if parameter is None else parameter.detach().new_empty(0)
        self.register_buffer("_like", like, persistent=False)
        self.replaced = type(norm).__name__
        self.train(norm.training)

    @property
    def weight(self) -> Removed:
        """What is left of the weight: its dtype and device."""
        like = self._like
        return Removed(like.dtype, like.device)

    def extra_repr(self) -> str:
        """What it replaces."""
        return f"replaces {self.replaced}"


def remove_layer_norms(model: nn.Module, layers: Layers = "all") -> nn.Module:
    """Replace layer norms in place by the identity (Zhai et al. 2023: σReparam trains without them).

    `nn.LayerNorm`, `nn.RMSNorm`, their subclasses, and classes named like them (`LlamaRMSNorm`,
    `T5LayerNorm`): what has no layers within, and takes one input. Norms of queries and keys within
    attention are among them, and so is the norm within an adaptive one, whose modulation stays. Batch and
    group norms are left alone, and so are calls of `F.layer_norm` in the code of a model.

    The paper's recipe is this, then `reinitialise`, then `sigma_reparam(model, gamma="one")`. It is meant
    for training from scratch: a trained model computes something else without its norms. Make the optimizer
    afterwards, and load weights from before it, for state dicts lose the norms' keys.

    Args:
        model: changed in place. `nn.TransformerEncoder` no longer turns padded batches into nested tensors,
            which only its kernel with norms can take.
        layers: "all", "attention" (norms within attention), patterns of the norms' names
            (`blocks.*.norm1`), or a function of name and module.

    Returns:
        The model.

    Raises:
        ConfigurationError: if nothing matches, a norm does more than to normalise one input (gates,
            activations), the model is itself a norm, or it is wrapped for distributed training. The model
            is left as it was.
    """
    require_unwrapped(model, _REMEDY, "which counts on the parameters that would go")
    names = module_names(model)
    norms = [module for module in names if is_layer_norm(module)]
    wanted = _predicate(model, layers, [names[norm] for norm in norms])
    chosen = [norm for norm in norms if wanted(names[norm], norm)]
    if not chosen:
        raise ConfigurationError(_nothing(model, layers, [names[norm] for norm in norms]))
    roots = whole_model(model)
    for norm in chosen:
        if norm is model or names[norm] in roots:
            raise ConfigurationError(
                f"{_REMEDY}: the model is itself a norm ({type(norm).__name__}), and nothing around it "
                "could take "
                "another layer in its place; give the model that it is part of"
            )
        if reason := _does_more(norm):
            raise ConfigurationError(
                f"{_REMEDY}: {names[norm]} ({type(norm).__name__}) cannot be replaced by the identity: "
                f"{reason}. "
                "Leave it out: layers=lambda name, module: …"
            )
    replacements = {norm: RemovedNorm(norm) for norm in chosen}
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child in replacements:
                module._modules[name] = replacements[child]
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(_is_bare(layer) for layer in module.layers):
            module.use_nested_tensor = False
    return model


def is_layer_norm(module: nn.Module) -> bool:
    """Whether a module normalises each token by itself: by its class, or by its class's name."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return True
    if any(name != "parametrizations" for name in module._modules):
        return False  # a block that is named after its norm; the norm lies within
    kinds = (c for c in type(module).__mro__ if c not in (RemovedNorm, nn.Module, object))
    return any(_NAMED.search(c.__name__) for c in kinds)


def _does_more(norm: nn.Module) -> str:
    """Why a norm is no mere norm; empty where it is one."""
    within = [name for name, child in norm._modules.items() if child and name != "parametrizations"]
    if within:
        return f"it has layers of its own ({', '.join(within)})"
    taken = [
        p.name
        for p in inspect.signature(norm.forward).parameters.values()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    return f"its forward takes more than one input ({', '.join(taken)})" if len(taken) > 1 else ""


def _is_bare(layer: nn.Module) -> bool:
    return any(isinstance(child, RemovedNorm) for child in layer.children())


def _predicate(model: nn.Module, layers: Layers, names: Sequence[str]) -> Callable[[str, nn.Module], bool]:
    if callable(layers):
        return layers
    if isinstance(layers, str) and layers == "all":
        return lambda name, module: True  # noqa: ARG005
    if isinstance(layers, str) and layers == "attention":
        owners, roots = attention_owners(model), whole_model(model)
        return lambda name, module: any(is_within(name, owner, roots) for owner in owners)  # noqa: ARG005
    patterns = (layers,) if isinstance(layers, str) else layers
    if not isinstance(patterns, Sequence) or not patterns or not all(isinstance(p, str) for p in patterns):
        raise ConfigurationError(
            f"{_REMEDY}: layers must be 'all', 'attention', a name pattern or a list of them, or a "
            "function of name "
            f"and module, got {layers!r}"
        )
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigurationError(_nothing(model, pattern, names))
    return lambda name, module: any(fnmatchcase(name, p) for p in patterns)  # noqa: ARG005


def _nothing(model: nn.Module, layers: Layers, names: Sequence[str]) -> str:
    kind = type(model).__name__
    if not names:
        if any(isinstance(module, RemovedNorm) for module in model.modules()):
            return f"{_REMEDY}: the layer norms of {kind} were removed before"
        return f"{_REMEDY}: {kind} has no nn.LayerNorm, nn.RMSNorm or class named like them"
    near = difflib.get_close_matches(layers, names, 3, 0.4) if isinstance(layers, str) else []
    shown = getattr(layers, "__name__", repr(layers)) if callable(layers) else repr(layers)
    return (
        f"{_REMEDY}: layers={shown} matches no layer norm of {kind}; it has {', '.join(near or names[:5])}, …"
    )
