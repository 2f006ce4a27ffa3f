"""A frozen patch embedding: a random projection of patches that is never trained (MoCo v3)."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import is_lazy

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.hooks import module_names
from entropy_monitor.hooks.structure import attention_owners, is_within, whole_model
from entropy_monitor.remedies.wrapping import require_unwrapped

logger = logging.getLogger("entropy_monitor")

_REMEDY = "freeze_patch_embedding"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NAMED = re.compile(
    r"(to_)?patch_?(embed(d?ing|d?ings|der)?|proj(ection)?|conv|ify)(_proj(ection)?)?"
    r"|(to_)?patch_to_embedding|embed_patches|x_embedder"
)
_CLASS = re.compile(r"patch_?embed|patchify", re.IGNORECASE)
_PLAIN = re.compile(
    r"(patch|tokens?|image|pixel)?_?(embed|embedding|embedder)|conv_proj|patches|tokeni[sz]er|patcher"
)


def freeze_patch_embedding(model: nn.Module, name: str | None = None) -> nn.Module:
    """Freeze the layer that turns patches into tokens (Chen et al. 2021, MoCo v3, section 4.2).

    Large gradients in the first layer are one of two instabilities of self-supervised vision transformers
    (Zhai et al. 2023, SimCLR); a fixed random projection cures that one. Its weight and bias get
    `requires_grad=False` and no gradient, so that optimizers leave them alone, weight decay included.
    Position embeddings and class tokens are trained as before.

    Args:
        model: changed in place.
        name: of the layer, or of the module that holds it; a pattern as `fnmatch` knows them. Without it
            the layer is looked for: one linear layer or convolution under a name or class that the field
            gives it (`patch_embed`, `patch_embeddings.projection`, `conv_proj`, …), else the one
            convolution of which the stride is the kernel, else the one layer called `embed` or so in a
            model without `nn.Embedding`.

    Returns:
        The model. The log names the layer.

    Raises:
        ConfigurationError: if none or several are found, with what there is; if it is frozen already,
            shares its weight with another layer, or the model is wrapped for distributed training. The
            model is left as it was.
    """
    require_unwrapped(model, _REMEDY, "which counts on a gradient of each parameter")
    names = {module: label for module, label in module_names(model).items() if _is_layer(module)}
    chosen = _find(model, names) if name is None else _named(model, names, name)
    for layer in chosen:
        _require_freezable(model, layer, names[layer])
    for layer in chosen:
        for parameter in layer.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None  # with one, weight decay and momentum would go on
    logger.info("entropy-monitor: froze the patch embedding %s", ", ".join(names[layer] for layer in chosen))
    return model


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, *_CONVOLUTIONS))


def _named(model: nn.Module, names: dict[nn.Module, str], name: str) -> list[nn.Module]:
    """The layers that a name or pattern stands for, or that lie in the modules that it names."""
    if not isinstance(name, str) or not name:
        raise ConfigurationError(f"{_REMEDY}: name must be the name of a module, or a pattern, got {name!r}")
    everything = module_names(model)
    roots = whole_model(model)
    matched = [label for label in everything.values() if fnmatchcase(label, name) and label not in roots]
    matched += [label for layer, label in names.items() if layer is model and fnmatchcase(label, name)]
    found = [x for x, label in names.items() if any(label == m or is_within(label, m, ()) for m in matched)]
    if found:
        return found
    if matched:
        raise ConfigurationError(
            f"{_REMEDY}: {matched[0]} of {type(model).__name__} is no linear layer or convolution, and has "
            "none within"
        )
    near = difflib.get_close_matches(name, everything.values(), 3, 0.4)
    raise ConfigurationError(
        f"{_REMEDY}: name={name!r} matches no module of {type(model).__name__}; it has "
        f"{', '.join(near or list(names.values())[:5])}, …"
    )


def _find(model: nn.Module, names: dict[nn.Module, str]) -> list[nn.Module]:
    owners = attention_owners(model)
    outside = {x: label for x, label in names.items() if not any(is_within(label, o, ()) for o in owners)}
    holders = [
        label
        for module, label in module_names(model).items()
        if module is not model and any(_CLASS.search(c.__name__) for c in type(module).__mro__[:-2])
    ]
    tiers: tuple[Iterable[nn.Module], ...] = (
        (
            x
            for x, label in outside.items()
            if any(_NAMED.fullmatch(part) for part in label.split("."))
            or any(is_within(label, holder, ()) for holder in holders)
        ),
        (x for x in outside if _cuts_patches(x)),
        (x for x, label in outside.items() if _PLAIN.fullmatch(label.rsplit(".", 1)[-1]))
        if not any(isinstance(module, nn.Embedding) for module in model.modules())
        else (),
    )
    for tier in tiers:
        found = list(tier)
        if len(found) == 1:
            return found
        if found:
            raise ConfigurationError(
                f"{_REMEDY}: {type(model).__name__} has {len(found)} layers that may be its patch embedding: "
                f"{', '.join(names[x] for x in found[:8])}; say which: name={names[found[0]]!r}, or a "
                "pattern for several"
            )
    first = ", ".join(list(outside.values())[:5]) or "none"
    raise ConfigurationError(
        f"{_REMEDY}: no layer of {type(model).__name__} looks like a patch embedding; say which it is: "
        f"name=… (its first linear layers and convolutions: {first})"
    )


def _cuts_patches(layer: nn.Module) -> bool:
    """Whether a convolution takes patches that do not overlap."""
    if not isinstance(layer, _CONVOLUTIONS):
        return False
    kernel, stride = tuple(layer.kernel_size), tuple(layer.stride)
    return kernel == stride and max(kernel) > 1 and layer.groups == 1


def _require_freezable(model: nn.Module, layer: nn.Module, name: str) -> None:
    parameters = list(layer.parameters())
    if any(is_lazy(p) for p in parameters):
        raise ConfigurationError(
            f"{_REMEDY}: {name} has no shape yet (a lazy layer); run one forward of the model first"
        )
    if not any(p.requires_grad for p in parameters):
        raise ConfigurationError(
            f"{_REMEDY}: {name} is frozen already: none of its parameters requires a gradient"
        )
    own = {id(p) for p in parameters}
    within = set(layer.modules())
    for other, label in module_names(model).items():
        shared = [n for n, p in other._parameters.items() if p is not None and id(p) in own]
        if shared and other not in within:
            raise ConfigurationError(
                f"{_REMEDY}: the weight of {name} is also {label}.{shared[0]}, which would be frozen with "
                "it; untie them first"
            )
