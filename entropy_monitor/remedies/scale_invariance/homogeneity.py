"""How a model's output grows with its parameters: the k of `f(c x) = c^k f(x)`, measured (Li et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.hooks import module_names
from entropy_monitor.hooks.names import clean_name
from entropy_monitor.remedies.scale_invariance.breaks import Breaks, Fit
from entropy_monitor.remedies.scale_invariance.report import GroupDegree, Homogeneity
from entropy_monitor.undisturbed import run_eagerly, unchanged

_NAME = "probe_homogeneity"

Members = str | nn.Parameter | Iterable[str | nn.Parameter]


def probe_homogeneity(
    model: nn.Module,
    loss_fn: Callable[[nn.Module], Tensor],
    *,
    scales: Sequence[float] = (0.5, 2.0),
    groups: Mapping[str, Members] | None = None,
    rtol: float = 1e-3,
) -> Homogeneity:
    """Measure k in `f(c x) = c^k f(x)`, and say which part breaks it (Li et al., ICML 2022).

    x are the parameters that are trained (all of them, where none is). A loss of degree 0 does not depend on
    the scale of initialisation, and its gradients shrink as parameters grow, which bounds the effect of a
    large step (with any learning rate it may still be trained badly); the higher the degree, the more
    sensitive it is to both. Rounding alone leaves a residual near 1e-6 in float32, 1e-14 in float64.

    Runs the function `2 + (1 + groups) · scales` times without gradients, and `1 + scales` times with hooks,
    which keep a copy of what every module is given and gives: take a small batch. The model stays in its
    mode, and every run starts from the same random state (dropout draws the same mask) and the same buffers.
    Afterwards parameters have every bit they had, as have buffers, modes and random states; versions of
    parameters do not move. Compiled code is run as it was written.

    Args:
        model: whose parameters are scaled, in place, and put back.
        loss_fn: of the model, giving a loss or outputs: `lambda m: m(batch)`. Takes the same batch each time.
        scales: at least two positive numbers other than 1: a loss is one number, and some power of c always
            leads from one number to another. Powers of two scale without rounding.
        groups: what to scale alone: name to parameters, or to patterns of their names (`blocks.*.weight`, or
            the name of a module). None takes each module that owns trained parameters; tied ones go with the
            first owner. `{}` leaves groups out.
        rtol: the largest residual that counts as homogeneous.

    Returns:
        Homogeneity.

    Raises:
        ConfigurationError: if an argument is wrong; if the model has no values to scale; if the function
            gives no floating tensor, NaN, or something else each time.
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"{_NAME}: model must be a torch.nn.Module, got {type(model).__name__}")
    if not callable(loss_fn):
        raise ConfigurationError(
            f"{_NAME}: loss_fn must be a function of the model that returns a tensor, such as "
            f"lambda m: m(batch), got {loss_fn!r}"
        )
    chosen = _checked_scales(scales)
    _require_tolerance(rtol)
    named = _named_parameters(model)
    trained = {name: p for name, p in named.items() if p.requires_grad} or named
    members = _groups_of(model, named, trained, groups)
    everything = list({id(p): p for some in (trained, *members.values()) for p in some.values()}.values())

    with torch.no_grad(), run_eagerly(model), _kept(everything) as scaled:

        def evaluate() -> Tensor:
            with unchanged(model):
                return _checked_result(loss_fn(model))

        base = evaluate()
        _require_repeatable(base, evaluate(), rtol)
        whole = _fit(base, evaluate, scaled, trained, chosen)
        alone = [
            (name, group, _fit(base, evaluate, scaled, group, chosen)) for name, group in members.items()
        ]
        breaks = Breaks(model, rtol)
        for scale in (1.0, *chosen):
            with scaled(trained, scale), unchanged(model):
                breaks.run(lambda: _checked_result(loss_fn(model), first=False), scale)

    return Homogeneity(
        whole.degree,
        whole.residual,
        whole.residual <= rtol,
        tuple(
            GroupDegree(
                name, f.degree, f.residual, f.residual <= rtol, sum(p.numel() for p in group.values())
            )
            for name, group, f in alone
        ),
        breaks.found(),
        tuple(breaks.modules()),
        tuple(name for name, p in trained.items() if not bool(p.detach().any())),
        tuple(name for name in named if name not in trained),
        chosen,
        rtol,
    )


Scaled = Callable[[Mapping[str, nn.Parameter], float], AbstractContextManager[None]]


@contextmanager
def _kept(parameters: list[nn.Parameter]) -> Iterator[Scaled]:
    """Give what scales parameters for a while; whatever happens, they get back every bit in the end.

    By way of `.data`: nobody's graph and nobody's version counter sees values that do not stay.
    """
    kept = {id(p): p.detach().clone() for p in parameters}

    @contextmanager
    def scaled(some: Mapping[str, nn.Parameter], scale: float) -> Iterator[None]:
        try:
            for p in some.values():
                p.data.copy_(kept[id(p)] * scale)
            torch.clear_autocast_cache()  # it goes by identity, and would give the values of before
            yield
        finally:
            for p in some.values():
                p.data.copy_(kept[id(p)])
            torch.clear_autocast_cache()

    yield scaled


def _fit(
    base: Tensor,
    evaluate: Callable[[], Tensor],
    scaled: Scaled,
    some: Mapping[str, nn.Parameter],
    scales: tuple[float, ...],
) -> Fit:
    fit = Fit()
    for scale in scales:
        with scaled(some, scale):
            fit.add(scale, evaluate(), base)
    return fit


def _require_tolerance(rtol: Any) -> None:
    if isinstance(rtol, bool) or not isinstance(rtol, Real) or not 0 < float(rtol) < math.inf:
        raise ConfigurationError(f"{_NAME}: rtol must be a number above 0, got {rtol!r}")


def _checked_scales(scales: Any) -> tuple[float, ...]:
    try:
        chosen = tuple(float(c) for c in scales)
    except (TypeError, ValueError):
        chosen = ()
    if isinstance(scales, str) or any(not 0 < c < math.inf or c == 1 for c in chosen) or len(set(chosen)) < 2:
        raise ConfigurationError(
            f"{_NAME}: scales must be at least two different positive numbers other than 1, got {scales!r}"
        )
    return chosen


def _checked_result(result: object, *, first: bool = True) -> Tensor:
    if not isinstance(result, Tensor):
        raise ConfigurationError(
            f"{_NAME}: loss_fn must return a tensor, got {type(result).__name__}; return the loss or the "
            "outputs, such as lambda m: m(batch).logits"
        )
    if not result.is_floating_point():
        raise ConfigurationError(
            f"{_NAME}: loss_fn returned {result.dtype}; degrees are those of floating tensors: return the "
            "loss or the logits, not choices made from them"
        )
    return result.detach().clone() if first else result


def _require_repeatable(base: Tensor, again: Tensor, rtol: float) -> None:
    if base.isnan().any() or not base.numel():
        what = "nothing" if not base.numel() else f"NaN in {int(base.isnan().sum())} of {base.numel()} values"
        raise ConfigurationError(
            f"{_NAME}: loss_fn gave {what}, with the parameters as they are; there is no degree to measure"
        )
    fit = Fit()
    fit.add(math.e, again, base) if base.shape == again.shape else None
    if base.shape != again.shape or fit.residual > rtol or abs(fit.degree) > rtol:
        raise ConfigurationError(
            f"{_NAME}: loss_fn gave something else the second time, with the same parameters and random "
            "state; have it use the same batch each time"
        )


def _named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    named = {clean_name(name): p for name, p in model.named_parameters()}
    for name, p in named.items():
        if is_lazy(p) or p.is_meta:
            what = "has no shape yet; run one forward first" if is_lazy(p) else "is on the meta device"
            raise ConfigurationError(f"{_NAME}: parameter {name} {what}")
    named = {name: p for name, p in named.items() if p.is_floating_point() or p.is_complex()}
    if not named:
        raise ConfigurationError(f"{_NAME}: {type(model).__name__} has no floating parameter to scale")
    return named


def _groups_of(
    model: nn.Module,
    named: dict[str, nn.Parameter],
    trained: dict[str, nn.Parameter],
    groups: Mapping[str, Members] | None,
) -> dict[str, dict[str, nn.Parameter]]:
    """The parameters of each group."""
    if groups is not None:
        if not isinstance(groups, Mapping):
            raise ConfigurationError(
                f"{_NAME}: groups must be a dict from a group's name to its parameters or patterns of their "
                f"names, or None, got {type(groups).__name__}"
            )
        return {name: _members(name, value, named) for name, value in groups.items()}
    names = {id(p): name for name, p in trained.items()}
    found: dict[str, dict[str, nn.Parameter]] = {}
    for module, name in module_names(model).items():
        own = {names.pop(id(p)): p for p in module.parameters(recurse=False) if id(p) in names}
        if own:
            found[name] = own
    return found


def _members(group: str, value: Members, named: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    names = {id(p): name for name, p in named.items()}
    found: dict[str, nn.Parameter] = {}
    items = [value] if isinstance(value, (str, Tensor)) else value
    for item in items if isinstance(items, Iterable) else [items]:
        if isinstance(item, Tensor):
            if id(item) not in names:
                raise ConfigurationError(
                    f"{_NAME}: group {group!r}: a tensor of shape {list(item.shape)} is none of the model's"
                )
            found[names[id(item)]] = named[names[id(item)]]
            continue
        if not isinstance(item, str):
            raise ConfigurationError(
                f"{_NAME}: group {group!r} must hold parameters or patterns of their names, got {item!r}"
            )
        matching = {n: p for n, p in named.items() if fnmatchcase(n, item) or n.startswith(f"{item}.")}
        if not matching:
            raise ConfigurationError(
                f"{_NAME}: group {group!r}: {item!r} matches no parameter; there are "
                f"{', '.join(list(named)[:5])}, …"
            )
        found |= matching
    if not found:
        raise ConfigurationError(f"{_NAME}: group {group!r} is empty")
    return found
