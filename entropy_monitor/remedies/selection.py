"""Which layers of a model a remedy is for: those that a user chose, and why others are left alone."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.hooks import module_names
from entropy_monitor.hooks.structure import attention_owners, is_within, whole_model

Layers = str | Sequence[str] | Callable[[str, nn.Module], bool]
"""`"all"`, `"attention"`, name patterns as `fnmatch` knows them, or a predicate of name and module."""

_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Form = Literal["linear", "transposed", "kernel"]
"""How a weight holds its matrix: `[out, in]`, `[in, out]`, or a kernel `[out, in, …]` that is flattened."""


@dataclass(frozen=True)
class LayerWeight:
    """A weight of a layer, and how it is a matrix.

    Attributes:
        name: the layer's qualified name, without what wrappers add.
        layer: the layer.
        tensor: name of the weight in the layer.
        form: how it holds its matrix.
        others: layers that share the weight, with the name it has there.
        fused: parts that it joins, as `nn.MultiheadAttention` does; empty where it is one map.
    """

    name: str
    layer: nn.Module
    tensor: str
    form: Form = "linear"
    others: tuple[tuple[str, nn.Module, str], ...] = ()
    fused: tuple[str, ...] = ()

    @property
    def value(self) -> Tensor:
        """The weight as it is now."""
        weight: Tensor = getattr(self.layer, self.tensor)
        return weight

    @property
    def label(self) -> str:
        """The weight's qualified name."""
        return f"{self.name}.{self.tensor}" if self.name else self.tensor

    def matrix(self) -> Tensor:
        """The weight as `[out, in]`, a view."""
        if self.form == "kernel":
            return self.value.flatten(1)
        return self.value.t() if self.form == "transposed" else self.value


@dataclass(frozen=True)
class Selection:
    """What was chosen.

    Attributes:
        weights: those to treat, in the model's order.
        left: weights that the choice would have taken and that are left alone: label to reason.
    """

    weights: tuple[LayerWeight, ...]
    left: dict[str, str]


def select_weights(
    model: nn.Module,
    layers: Layers,
    *,
    remedy: str,
    tied: bool = False,
    embeddings: bool = False,
    finite: bool = True,
) -> Selection:
    """The weights of linear maps that a choice names; nothing is touched.

    `nn.Linear`, `nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`, the `Conv1D` of Hugging Face `transformers`,
    `nn.MultiheadAttention` (its joint or separate in-projections), and `nn.Embedding` on request.

    Args:
        model: whose layers.
        layers: see `Layers`.
        remedy: what is to be done, for errors.
        tied: whether to take weights that several layers share.
        embeddings: whether to take embeddings.
        finite: whether to refuse weights that hold NaN or infinity.

    Raises:
        ConfigurationError: if nothing matches, or a weight cannot be treated: it is parametrized, quantized,
            without values, or no matrix.
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"{remedy}: model must be a torch.nn.Module, got {type(model).__name__}")
    names = [name for layer, name in module_names(model).items() if is_known_kind(layer)]
    wanted = chooser(model, layers, remedy, names, partial(_nothing, model, remedy, names))
    sharers = _sharers(model)
    chosen: list[LayerWeight] = []
    left: dict[str, str] = {}
    taken: set[int] = set()
    matched = False
    for layer, name in module_names(model).items():
        for weight in _weights_of(layer, name):
            if not wanted(name, layer):
                continue
            matched = True
            if isinstance(layer, nn.Embedding) and not embeddings:
                left[weight.label] = "an embedding; embeddings=True takes it"
                continue
            _require_usable(weight, remedy)
            if finite:
                _require_finite(weight, remedy)
            others = tuple(s for s in sharers.get(id(weight.value), ()) if s[1] is not layer)
            if others and not tied:
                holders = ", ".join(other for other, *_ in others)
                left[weight.label] = f"its weight is tied to that of {holders}; tied=True takes it"
                continue
            if id(weight.value) in taken:
                continue
            taken.add(id(weight.value))
            chosen.append(LayerWeight(name, layer, weight.tensor, weight.form, others, weight.fused))
    if not matched:
        raise ConfigurationError(_nothing(model, remedy, names, layers))
    if layers == "all":
        left |= dict.fromkeys(_unknown_matrices(model), "in no layer of a kind that is known")
    if not chosen:
        reasons = "; ".join(f"{label}: {why}" for label, why in list(left.items())[:5])
        raise ConfigurationError(f"{remedy}: layers={shown(layers)} leaves nothing to do: {reasons}")
    return Selection(tuple(chosen), left)


def _unknown_matrices(model: nn.Module) -> list[str]:
    """Names of parameters that may be matrices, such as those of experts, in layers of other kinds."""
    return [
        f"{name}.{tensor}"
        for layer, name in module_names(model).items()
        if not is_known_kind(layer) and not parametrize.is_parametrized(layer)
        for tensor, parameter in layer._parameters.items()
        if parameter is not None and not is_lazy(parameter) and parameter.dim() >= 2
    ]


def is_known_kind(layer: nn.Module) -> bool:
    """Whether a layer is of a kind whose weights can be chosen."""
    return next(_weights_of(layer, ""), None) is not None


def chooser(
    model: nn.Module,
    layers: Layers,
    remedy: str,
    names: Sequence[str],
    nothing: Callable[[Layers], str],
) -> Callable[[str, nn.Module], bool]:
    """A choice as a predicate of name and module.

    Args:
        model: whose layers.
        layers: the choice.
        remedy: what is to be done, for errors.
        names: those that patterns may match.
        nothing: what to say of a pattern that matches none of them.

    Raises:
        ConfigurationError: if it is no choice, or part of it matches nothing.
    """
    if callable(layers):
        return layers
    if isinstance(layers, str) and layers == "all":
        return lambda name, layer: True  # noqa: ARG005
    if isinstance(layers, str) and layers == "attention":
        owners = attention_owners(model)
        if not owners:
            raise ConfigurationError(
                f"{remedy}: layers='attention', and no module of {type(model).__name__} looks like "
                "attention; name the layers by patterns: layers=['blocks.*.q_proj', …]"
            )
        roots = whole_model(model)
        return lambda name, layer: any(  # noqa: ARG005
            name == owner or is_within(name, owner, roots) for owner in owners
        )
    patterns = as_patterns(layers, remedy)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigurationError(nothing(pattern))
    return lambda name, layer: any(fnmatchcase(name, p) for p in patterns)  # noqa: ARG005


def as_patterns(layers: object, remedy: str, words: str = "'all', 'attention'") -> tuple[str, ...]:
    """The name patterns of a choice that is neither a function nor one of `words`; raises if it is none."""
    patterns = (layers,) if isinstance(layers, str) else layers
    if not isinstance(patterns, Sequence) or not patterns or not all(isinstance(p, str) for p in patterns):
        raise ConfigurationError(
            f"{remedy}: layers must be {words}, a name pattern or a list of them, or a function of name and "
            f"module, got {layers!r}"
        )
    return tuple(patterns)


def shown(layers: Layers) -> str:
    """A choice, for errors."""
    return getattr(layers, "__name__", repr(layers)) if callable(layers) else repr(layers)


def _nothing(model: nn.Module, remedy: str, names: Sequence[str], layers: Layers) -> str:
    if not names:
        return f"{remedy}: {type(model).__name__} has no linear layer that could be treated"
    near = difflib.get_close_matches(layers, names, 3, 0.4) if isinstance(layers, str) else []
    return (
        f"{remedy}: layers={shown(layers)} matches no linear layer of {type(model).__name__}; "
        f"it has {', '.join(near or names[:5])}, …"
    )


def _weights_of(layer: nn.Module, name: str) -> Iterator[LayerWeight]:
    if isinstance(layer, nn.MultiheadAttention):
        if "in_proj_weight" in _tensors(layer):
            yield LayerWeight(name, layer, "in_proj_weight", fused=("query", "key", "value"))
        else:
            for tensor in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
                yield LayerWeight(name, layer, tensor)
    elif isinstance(layer, (nn.Linear, nn.Embedding)):
        yield LayerWeight(name, layer, "weight")
    elif isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        yield LayerWeight(name, layer, "weight", "kernel")
    elif hasattr(layer, "nf") and any(c.__name__ == "Conv1D" for c in type(layer).__mro__):
        yield LayerWeight(name, layer, "weight", "transposed")
    elif "quantized" in type(layer).__module__ and callable(getattr(layer, "weight", None)):
        yield LayerWeight(name, layer, "weight")  # to be refused by name


def _tensors(layer: nn.Module) -> set[str]:
    """Names of a layer's weights, parametrized ones too; what is None is not there."""
    plain = {name for name, p in layer._parameters.items() if p is not None}
    lists: Any = getattr(layer, "parametrizations", ())
    return plain | set(lists)


def _require_usable(weight: LayerWeight, remedy: str) -> None:
    layer, label = weight.layer, weight.label
    if parametrize.is_parametrized(layer, weight.tensor):
        lists: Any = layer.parametrizations
        by = ", ".join(type(p).__name__ for p in lists[weight.tensor])
        raise ConfigurationError(
            f"{remedy}: {label} is parametrized already (by {by}); em.fold(model) makes plain layers of it, "
            "or leave the layer out with layers=…"
        )
    value = getattr(layer, weight.tensor, None)
    if not isinstance(value, nn.Parameter) and isinstance(value, Tensor):
        raise ConfigurationError(
            f"{remedy}: {label} is no parameter: something computes it before each forward "
            "(torch.nn.utils.weight_norm, spectral_norm or prune); remove that first"
        )
    if not isinstance(value, Tensor) or not (is_lazy(value) or value.dtype in _FLOATING):
        what = type(layer).__name__ if not isinstance(value, Tensor) else str(value.dtype)
        raise ConfigurationError(
            f"{remedy}: {label} is quantized or not real ({what}); only weights in float64, float32, "
            "bfloat16 and float16 can be treated. Leave the layer out with layers=…, or treat the model "
            "before it is quantized"
        )
    if is_lazy(value):
        raise ConfigurationError(
            f"{remedy}: {label} has no shape yet (a lazy layer); run one forward of the model first"
        )
    if value.is_meta:
        raise ConfigurationError(
            f"{remedy}: {label} is on the meta device, which has shapes and no values; give the model its "
            "weights first: model.to_empty(device=…), then initialise or load"
        )
    if value.dim() != 2 and not (weight.form == "kernel" and value.dim() > 2):
        raise ConfigurationError(
            f"{remedy}: {label} has shape {tuple(value.shape)}, which is no matrix. Where FSDP flattened it, "
            "treat the model before it is wrapped"
        )
    if value.numel() == 0:
        raise ConfigurationError(
            f"{remedy}: {label} has shape {tuple(value.shape)} and so no entries here. Where weights are "
            "split over processes, treat the model before it is wrapped"
        )


def _require_finite(weight: LayerWeight, remedy: str) -> None:
    if not torch.isfinite(weight.value.detach()).all():
        raise ConfigurationError(
            f"{remedy}: {weight.label} holds NaN or infinity; go back to a checkpoint from before that"
        )


def _sharers(model: nn.Module) -> dict[int, list[tuple[str, nn.Module, str]]]:
    """Where each parameter is used, by its identity, for those that more than one place uses."""
    places: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for module, name in module_names(model).items():
        for tensor, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((name, module, tensor))
    return {key: found for key, found in places.items() if len(found) > 1}
