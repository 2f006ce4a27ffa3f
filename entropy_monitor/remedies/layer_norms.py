"""Training without layer norms: each is replaced by an identity, as in the paper's LayerNorm-free recipe."""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.hooks import module_names
from entropy_monitor.hooks.structure import whole_model
from entropy_monitor.measures._precision import exact
from entropy_monitor.remedies.selection import Layers, chooser, shown
from entropy_monitor.remedies.wrapping import require_unwrapped
from entropy_monitor.undisturbed import unchanged

_REMEDY = "remove_layer_norms"
_NAMED = re.compile(r"(layer|rms)_?norm", re.IGNORECASE)
_TOLERANCE = 1e-3  # of the part of an output that varies: an eps up to 1e-2 is felt less
_TOLERANCE_LOW = 5e-2  # bf16 and fp16


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

    A norm whose forward is not torch's own is run once on a few random tokens, without gradients and with
    nothing of it staying: what it gives must be a scale and a shift of each feature of the normalised
    input. An activation, a linear map, a residual branch or active dropout is found so, unless a weight of
    zeros hides it. One that runs on none of the usual shapes (`[…, features]`, `[N, features, H, W]`), or has
    no values yet (meta device), is judged by its parameters only.

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
            activations, linear maps), the model is itself a norm, or it is wrapped for distributed training.
            The model is left as it was.
    """
    require_unwrapped(model, _REMEDY, "which counts on the parameters that would go")
    names = module_names(model)
    norms = [module for module in names if is_layer_norm(module)]
    labels = [names[norm] for norm in norms]
    nothing = partial(_nothing, model, labels)
    wanted = chooser(model, layers, _REMEDY, labels, nothing)
    chosen = [norm for norm in norms if wanted(names[norm], norm)]
    if not chosen:
        raise ConfigurationError(nothing(layers))
    roots = whole_model(model)
    for norm in chosen:
        if norm is model or names[norm] in roots:
            raise ConfigurationError(
                f"{_REMEDY}: the model is itself a norm ({type(norm).__name__}), and nothing around it "
                "could take another layer in its place; give the model that it is part of"
            )
        if reason := _does_more(norm):
            raise ConfigurationError(
                f"{_REMEDY}: {names[norm]} ({type(norm).__name__}) cannot be replaced by the identity: "
                f"{reason}. Leave it out: layers=lambda name, module: …"
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
    if len(taken) > 1:
        return f"its forward takes more than one input ({', '.join(taken)})"
    forward = getattr(norm.forward, "__func__", norm.forward)
    if forward in (nn.LayerNorm.forward, nn.RMSNorm.forward):
        return ""
    mere = _is_mere(norm)
    if mere is None and not isinstance(norm, (nn.LayerNorm, nn.RMSNorm)):
        large = [(n, p) for n, p in norm.named_parameters() if not is_lazy(p) and p.numel() != _longest(p)]
        if large:
            return f"its parameter {large[0][0]} of shape {list(large[0][1].shape)} is no scale of features"
    if mere is False:
        return "what it gives is not a scale and a shift of each feature of the normalised input"
    return ""


def _longest(parameter: Tensor) -> int:
    return max(parameter.shape, default=1)


def _is_mere(norm: nn.Module) -> bool | None:
    """Whether it gives a scale and a shift of what a norm of some kind would; None if it cannot be run."""
    if any(is_lazy(p) or p.is_meta for p in norm.parameters()):
        return None
    largest = max(norm.parameters(), key=Tensor.numel, default=torch.empty(16))
    verdict: bool | None = None
    for features, first in _shapes(norm, largest):
        # Tokens of different means and sizes, beside which an eps is small.
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(16, *features, dtype=torch.float64, generator=generator)
        each = (16, *(1 for _ in features))
        x = x * torch.linspace(6, 18, 16).view(each).double()
        x = (x + 8 * torch.randn(each, dtype=torch.float64, generator=generator)).to(largest)
        try:
            with torch.no_grad(), exact(x.device), unchanged(norm):
                given = norm.forward(_as_image(x) if first else x.view(2, 8, *features))
        except Exception:  # noqa: BLE001, S112  whatever code of others raises on a shape it is not made for
            continue
        if isinstance(given, Tensor) and first and given.dim() == 4:
            given = given.movedim(1, -1)
        fits = isinstance(given, Tensor) and given.numel() == x.numel() and given.shape[-1] == x.shape[-1]
        if fits and _is_affine(x.double(), given.reshape(x.shape).double(), len(features), x.dtype):
            return True
        verdict = False
    return verdict


def _shapes(norm: nn.Module, largest: Tensor) -> Iterator[tuple[tuple[int, ...], bool]]:
    """Shapes of a token that it may be made for, and whether features come before places, as in images."""
    own = getattr(norm, "normalized_shape", ())
    own = (own,) if isinstance(own, int) else tuple(own)
    shapes = [tuple(largest.shape), own, (largest.numel(),), tuple(largest.shape[-1:])]
    for shape in dict.fromkeys(shape for shape in shapes if shape and math.prod(shape) > 1):
        yield shape, False
        if len(shape) == 1:
            yield shape, True


def _as_image(tokens: Tensor) -> Tensor:
    """`[16, C]` as `[2, C, 2, 4]`."""
    return tokens.view(2, 2, 4, -1).movedim(-1, 1)


def _is_affine(x: Tensor, y: Tensor, dims: int, dtype: torch.dtype) -> bool:
    """Whether `y = a n + b` with one a and b for each feature, n one of the norms of x, all `[16, …]`."""
    low = dtype.itemsize < 4
    centred = y - y.mean(0)
    size, rounding = float(centred.norm()), 16 * torch.finfo(dtype).eps * float(y.norm())
    for over in range(1, dims + 1):
        last = tuple(range(-over, 0))
        for n in (x - x.mean(last, keepdim=True), x):
            n = n / n.square().mean(last, keepdim=True).sqrt()
            n = n - n.mean(0)
            a = (n * centred).sum(0) / n.square().sum(0).clamp(min=1e-30)
            if float((centred - a * n).norm()) <= (_TOLERANCE_LOW if low else _TOLERANCE) * size + rounding:
                return True
    return False


def _is_bare(layer: nn.Module) -> bool:
    return any(isinstance(child, RemovedNorm) for child in layer.children())


def _nothing(model: nn.Module, names: Sequence[str], layers: Layers) -> str:
    kind = type(model).__name__
    if not names:
        if any(isinstance(module, RemovedNorm) for module in model.modules()):
            return f"{_REMEDY}: the layer norms of {kind} were removed before"
        return f"{_REMEDY}: {kind} has no nn.LayerNorm, nn.RMSNorm or class named like them"
    near = difflib.get_close_matches(layers, names, 3, 0.4) if isinstance(layers, str) else []
    some = ", ".join(near or names[:5])
    return f"{_REMEDY}: layers={shown(layers)} matches no layer norm of {kind}; it has {some}, …"
