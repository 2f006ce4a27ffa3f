"""The initialisation of the paper's LayerNorm-free recipe: linear weights, from a truncated normal."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.utils import parametrize

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.remedies.selection import Layers, select_weights
from entropy_monitor.remedies.wrapping import require_unwrapped

_REMEDY = "reinitialise"


def reinitialise(
    model: nn.Module, layers: Layers = "all", *, std: float = 0.02, generator: torch.Generator | None = None
) -> nn.Module:
    """Draw the weights of linear layers anew: `torch.nn.init.trunc_normal_(weight, std=std)` of each.

    σReparam with γ = 1 starts from σ(Ŵ) = 1 whatever the weights are; what they were drawn from still tells
    how fast they turn. The paper's recipe without layer norms draws from a normal distribution of standard
    deviation 0.02, cut at ±2: call this before `sigma_reparam(model, gamma="one")`.

    The numbers are those that the loop `for layer in model.modules(): nn.init.trunc_normal_(layer.weight,
    std=std)` would draw. Biases, norms and embeddings keep their values. Weights that layers share, and
    frozen ones (`requires_grad` is False), are left alone, and no numbers are drawn for them.

    Args:
        model: changed in place; its parameters stay the same objects. What an optimizer has gathered for
            them is of the old weights: make it afterwards.
        layers: "all" (`nn.Linear`, convolutions, `nn.MultiheadAttention`, the `Conv1D` of Hugging Face
            `transformers`), "attention" (those within attention), name patterns, or a function of name and
            module.
        std: of the normal distribution.
        generator: of random numbers, on the device of the weights; torch's global one by default.

    Returns:
        The model.

    Raises:
        ConfigurationError: if nothing matches, all that matches is frozen, `std` is not a positive number, a
            weight cannot be drawn (it is parametrized, quantized, without values, or wrapped), or the
            generator is on another device. The model is left as it was.
    """
    if isinstance(std, bool) or not isinstance(std, (int, float)) or not 0 < std < math.inf:
        raise ConfigurationError(f"{_REMEDY}: std must be a positive number, such as 0.02, got {std!r}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ConfigurationError(
            f"{_REMEDY}: generator must be a torch.Generator or None, got {type(generator).__name__}"
        )
    require_unwrapped(model, _REMEDY, "which holds parts of the weights, or copies that must agree")
    try:
        selection = select_weights(model, layers, remedy=_REMEDY, finite=False)
    except ConfigurationError as error:
        if not any(parametrize.is_parametrized(module) for module in model.modules()):
            raise
        raise ConfigurationError(f"{error}. Re-initialise first, then reparametrize") from error
    trained = [weight for weight in selection.weights if weight.value.requires_grad]
    if not trained:
        some = ", ".join(weight.label for weight in selection.weights[:5])
        raise ConfigurationError(
            f"{_REMEDY}: all weights that were chosen are frozen ({some}), and frozen weights are left "
            "alone; call requires_grad_(True) on those that are to be drawn anew"
        )
    for weight in trained:
        device = weight.value.device.type
        if generator is not None and generator.device.type != device:
            raise ConfigurationError(
                f"{_REMEDY}: the generator is on {generator.device.type}, and {weight.label} on {device}; "
                f"give torch.Generator({device!r})"
            )
    for weight in trained:
        nn.init.trunc_normal_(weight.value, std=std, generator=generator)
    return model
