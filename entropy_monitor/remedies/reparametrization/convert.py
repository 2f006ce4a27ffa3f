"""σReparam on the layers of a model, and the two norms that it is compared with (Zhai et al. 2023)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.phrases import number
from entropy_monitor.remedies.reparametrization.folding import accept_plain_weights, parametrized, undo
from entropy_monitor.remedies.reparametrization.fused import Fused, find_groups
from entropy_monitor.remedies.reparametrization.spectral import SpectralScale
from entropy_monitor.remedies.selection import Layers, LayerWeight, Selection, select_weights
from entropy_monitor.remedies.wrapping import require_unwrapped

logger = logging.getLogger("entropy_monitor")

_UNSYNCHRONISED = "which would not synchronise the new parameters"

Gamma = Literal["one", "preserve"]


def sigma_reparam(
    model: nn.Module,
    layers: Layers = "all",
    *,
    gamma: Gamma,
    fused: Fused = "joint",
    example_inputs: Any = None,
    tied: bool = False,
    embeddings: bool = False,
) -> nn.Module:
    """Reparametrize linear layers in place: `Ŵ = (γ / σ(W)) W`, γ learnable (Zhai et al. 2023, section 3.2).

    The spectral norm of each weight is then a single parameter of its own, and no longer grows with every
    update of its entries. σ(W) = uᵀWv comes from power iteration in float32: it starts converged, without
    random numbers, and takes one step after each step of an optimizer that holds the weight, however many
    forwards, micro-batches or recomputations there are, and none in between. Where no optimizer of
    `torch.optim` makes the update, the first forward in training after it does, in code that is not compiled
    (under FSDP2 it must be one of `torch.optim`).

    The weight stays the parameter that it was, so an optimizer that holds it goes on; it does not hold γ yet:
    make it from `param_groups`, or call `convert_optimizer`. State dicts gain `parametrizations` keys; plain
    ones are taken all the same, and `fold` and `fold_state_dict` give plain ones back.

    Convert before wrapping in DistributedDataParallel or `fully_shard`, after `parallelize_module`; before or
    after `torch.compile`.

    Args:
        model: changed in place.
        layers: "all" (`nn.Linear`, convolutions as flattened kernels, `nn.MultiheadAttention`, the `Conv1D`
            of Hugging Face `transformers`), "attention" (those within attention), name patterns
            (`blocks.*.q_proj`), or a function of name and module.
        gamma: "one" starts from γ = 1, as the paper does for training from scratch: it changes what the model
            computes. "preserve" starts from γ = σ(W): the model computes what it did, so that a pretrained
            model or a run in trouble can be converted.
        fused: how to treat weights that join queries, keys and values: "joint", one σ and γ for all; "qk_v",
            queries and keys apart from values; "each".
        example_inputs: a tuple or dict of the model's inputs, needed to tell the parts of fused weights other
            than those of `nn.MultiheadAttention` apart; one forward without gradients is run, and leaves
            nothing.
        tied: whether to convert weights that several layers share, for all of them at once.
        embeddings: whether to convert `nn.Embedding`.

    Returns:
        The model.

    Raises:
        ConfigurationError: if nothing matches or something cannot be converted (parametrized already,
            quantized, without values, wrapped). The model is left as it was.
    """
    if gamma not in ("one", "preserve"):
        raise ConfigurationError(
            "sigma_reparam: gamma must be 'one' (as in the paper, for training from scratch) or 'preserve' "
            f"(keeps what the model computes), got {gamma!r}"
        )
    require_unwrapped(model, "sigma_reparam", _UNSYNCHRONISED)
    selection = select_weights(model, layers, remedy="sigma_reparam", tied=tied, embeddings=embeddings)
    groups = find_groups(model, selection, fused, example_inputs, "sigma_reparam")
    norms = _reparametrize(selection, groups, preserve=gamma == "preserve", learn=True)
    _tell_left(selection, "sigma_reparam")
    if gamma == "one":
        logger.warning(
            "entropy-monitor: gamma='one' set the spectral norm of %d weights to 1 (they had %s to %s): the "
            "model computes another function now. That is the recipe for training from scratch; for a "
            "trained model give gamma='preserve'",
            len(selection.weights),
            number(min(norms)),
            number(max(norms)),
        )
    return model


def spectral_norm(
    model: nn.Module,
    layers: Layers = "all",
    *,
    fused: Fused = "joint",
    example_inputs: Any = None,
    tied: bool = False,
    embeddings: bool = False,
) -> nn.Module:
    """Spectral Norm, σReparam's comparator: `Ŵ = W / σ(W)`, γ fixed at 1 (Miyato et al. 2018).

    Same machinery and arguments as `sigma_reparam`; it changes what the model computes, and in the paper
    training degrades without γ.

    Returns:
        The model.

    Raises:
        ConfigurationError: see `sigma_reparam`.
    """
    require_unwrapped(model, "spectral_norm", _UNSYNCHRONISED)
    selection = select_weights(model, layers, remedy="spectral_norm", tied=tied, embeddings=embeddings)
    groups = find_groups(model, selection, fused, example_inputs, "spectral_norm")
    _reparametrize(selection, groups, preserve=False, learn=False)
    _tell_left(selection, "spectral_norm")
    return model


def weight_norm(model: nn.Module, layers: Layers = "all") -> nn.Module:
    """Weight Norm, σReparam's comparator: `w = g v / ‖v‖` for each output feature (Salimans & Kingma 2016).

    `torch.nn.utils.parametrizations.weight_norm` on each layer; what the model computes is kept. Its
    parameters are new ones: make the optimizer afterwards.

    Args:
        model: changed in place.
        layers: see `sigma_reparam`.

    Returns:
        The model.

    Raises:
        ConfigurationError: see `sigma_reparam`; and if an output feature of a weight is all zero, which has
            no direction.
    """
    require_unwrapped(model, "weight_norm", _UNSYNCHRONISED)
    selection = select_weights(model, layers, remedy="weight_norm")
    for weight in selection.weights:
        zero = int((weight.matrix().detach().abs().amax(1) == 0).sum())
        if zero:
            raise ConfigurationError(
                f"weight_norm: {zero} output features of {weight.label} are all zero and have no direction "
                "to normalise; initialise them, or leave the layer out with layers=…"
            )

    def normalise(weight: LayerWeight) -> None:
        dim = 1 if weight.form == "transposed" else 0
        convert = partial(parametrizations.weight_norm, weight.layer, weight.tensor, dim)
        parametrized(weight.layer, weight.tensor, convert)

    _for_all_or_none(selection, normalise)
    _tell_left(selection, "weight_norm")
    return model


def _reparametrize(
    selection: Selection, groups: dict[str, Tensor], *, preserve: bool, learn: bool
) -> list[float]:
    """Convert every weight or none; the spectral norms that they had."""
    norms: list[float] = []

    def convert(weight: LayerWeight) -> None:
        value = weight.value
        scale = SpectralScale(value, preserve=preserve, learn=learn, group=groups.get(weight.label))
        norms.extend(scale.norms)
        for layer, tensor in ((weight.layer, weight.tensor), *((m, t) for _, m, t in weight.others)):
            register = partial(parametrize.register_parametrization, layer, tensor, scale, unsafe=True)
            parametrized(layer, tensor, register)
            accept_plain_weights(layer)
        scale.settle(weight.layer, weight.tensor)

    _for_all_or_none(selection, convert)
    return norms


def _for_all_or_none(selection: Selection, convert: Callable[[LayerWeight], None]) -> None:
    begun: list[LayerWeight] = []
    try:
        for weight in selection.weights:
            begun.append(weight)
            convert(weight)
    except BaseException:
        for weight in reversed(begun):
            undo(weight)
        raise


def _tell_left(selection: Selection, remedy: str) -> None:
    for label, why in selection.left.items():
        logger.info("entropy-monitor: %s left %s alone: %s", remedy, label, why)
