"""`entropy-monitor doctor`: what is measured of a model, what not, and whether watching changes anything."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from entropy_monitor.describe import Description
from entropy_monitor.errors import ConfigurationError
from entropy_monitor.looking import capture, check_values
from entropy_monitor.options import check_attention, check_wrapper
from entropy_monitor.run_info import versions
from entropy_monitor.undisturbed import unchanged

STAGES = ("building the model", "a run", "the same again", "a run that is watched")
"""What `examine` does, in this order."""

_LIBRARIES = ("transformers", "accelerate", "lightning", "peft", "flash_attn", "xformers", "timm")
_EXPECTED = (
    "it must return (model, inputs): a torch.nn.Module, and a tuple of positional or a dict of keyword "
    "arguments for its forward, or a single tensor"
)


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor found. Prints as a report.

    Attributes:
        target: `module:function`.
        description: what is measured, and what not.
        trained: whether there was a backward pass.
        repeatable: whether the model gives the same twice without being watched.
        identical: whether it gives the same watched: outputs, and gradients where there are any; None where
            it is not repeatable.
        difference: the largest difference that watching made, where there was one.
        non_finite: gradients that are not finite, by parameter; all parameters of one cause.
        versions: of what is installed.
    """

    target: str
    description: Description
    trained: bool
    repeatable: bool
    identical: bool | None
    difference: float | None = None
    non_finite: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_well(self) -> bool:
        """Whether all attention is covered, and watching changes nothing."""
        d = self.description
        return (
            bool(d.layers) and not (d.not_covered or d.faults or self.non_finite) and self.identical is True
        )

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return {**vars(self), "description": self.description.to_dict(), "is_well": self.is_well}

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield str(self.description)
        what = "outputs and gradients" if self.trained else "outputs"
        if self.identical:
            yield f"Watching changes nothing: {what} are the same to the bit with and without."
        elif self.identical is None:
            yield (
                f"Whether watching changes anything cannot be told: {what} differ between two runs without "
                "it, from the same random state."
            )
        else:
            yield f"Watching changes {what}, by at most {self.difference:.3g}."
        if self.non_finite:
            yield f"Gradients that are not finite: {', '.join(self.non_finite)}."
        if not self.trained:
            yield "Run with --train to check a training forward and its gradients."
        yield ", ".join(f"{name} {number}" for name, number in self.versions.items())


def examine(
    target: str, *, train: bool = False, on_stage: Callable[[str], object] | None = None
) -> Diagnosis:
    """Run a model with and without being watched, and say what was found.

    Args:
        target: `module:function`; the function builds and returns `(model, inputs)`. The current folder can
            be imported from.
        train: run in train mode, with a backward pass; otherwise in the mode that the model is in, without
            gradients.
        on_stage: told which of `STAGES` begins.

    Returns:
        What was found.

    Raises:
        ConfigurationError: the target cannot be used, or its forward raised.
        AttentionNotFoundError: the model has no attention that could be seen.
    """
    building, once, again, watching = STAGES

    def begin(stage: str) -> None:
        if on_stage is not None:
            on_stage(stage)

    begin(building)
    model, args, kwargs = _build(target)
    check_wrapper(model)
    check_values(model, args, kwargs)
    check_attention(model, (), None)

    def run() -> Outcome:
        with _forward_of(target), unchanged(model):
            return _run(model, args, kwargs, train)

    if train:
        model.train()
    if _is_lazy(model):
        run()  # makes its parameters, which draws random numbers
    begin(once)
    first = run()
    begin(again)
    second = run()
    begin(watching)
    with capture(model) as seen:
        watched = run()
    repeatable = _difference(first, second) == 0
    difference = _difference(first, watched)
    return Diagnosis(
        target,
        seen.describe(),
        train,
        repeatable,
        difference == 0 if repeatable else None,
        difference if repeatable and difference else None,
        tuple(name for name, g in watched.gradients.items() if not bool(g.isfinite().all())),
        versions() | _libraries(),
    )


@dataclass(frozen=True)
class Outcome:
    """What a run gave: the tensors of its output, and the gradients of its parameters."""

    outputs: tuple[Tensor, ...]
    gradients: Mapping[str, Tensor]


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], train: bool) -> Outcome:
    with nullcontext() if train else torch.no_grad():
        output = model(*args, **kwargs)
    outputs = _tensors(output)
    gradients: dict[str, Tensor] = {}
    if train:
        kept = {parameter: parameter.grad for parameter in model.parameters()}
        for parameter in kept:
            parameter.grad = None
        try:
            _loss(output, outputs).backward()  # type: ignore[no-untyped-call]
            named = model.named_parameters()
            gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}
        finally:
            for parameter, gradient in kept.items():
                parameter.grad = gradient
    return Outcome(tuple(t.detach().clone() for t in outputs), gradients)


def _tensors(output: object) -> tuple[Tensor, ...]:
    """The tensors in what a forward returned: a tensor, a tree of them, or an object that holds such."""
    leaves = tree_leaves(output)
    if not any(isinstance(leaf, Tensor) for leaf in leaves) and hasattr(output, "__dict__"):
        leaves = tree_leaves(dict(vars(output)))
    return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))


def _loss(output: object, outputs: tuple[Tensor, ...]) -> Tensor:
    """The model's own loss, or one in which every entry of its outputs counts differently."""
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(own, Tensor) and own.numel() == 1 and own.requires_grad:
        return own.reshape(())
    losses = []
    for out in outputs:
        if out.requires_grad and out.is_floating_point():
            weights = torch.linspace(-1, 1, out.numel(), device=out.device)
            losses.append((out.float().flatten() * weights).square().mean())
    if not losses:
        raise ConfigurationError(
            "the forward returned no tensor with gradients, so that there is nothing to train: return a "
            "model with parameters that require gradients, or leave out --train"
        )
    return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()


def _difference(one: Outcome, two: Outcome) -> float:
    """The largest difference of any figure, 0 where all are the same to the bit; inf where forms differ."""
    if one.gradients.keys() != two.gradients.keys() or len(one.outputs) != len(two.outputs):
        return float("inf")
    pairs = [*zip(one.outputs, two.outputs, strict=True)]
    pairs += [(gradient, two.gradients[name]) for name, gradient in one.gradients.items()]
    largest = 0.0
    for a, b in pairs:
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        equal = (a == b) | ((a != a) & (b != b))
        if not bool(equal.all()):
            gap = (a.double() - b.double()).abs()[~equal].max().item()
            largest = max(largest, gap if gap == gap else float("inf"))
    return largest


def _build(target: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    made = _called(target)
    if not isinstance(made, (tuple, list)) or len(made) != 2 or not isinstance(made[0], nn.Module):
        got = type(made).__name__
        if isinstance(made, (tuple, list)):
            got = f"{got} of {', '.join(type(item).__name__ for item in made) or 'nothing'}"
        raise ConfigurationError(f"{target} returned {got}; {_EXPECTED}")
    model, inputs = made
    if isinstance(inputs, Mapping):
        return model, (), {str(name): value for name, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return model, tuple(inputs), {}
    if isinstance(inputs, Tensor):
        return model, (inputs,), {}
    raise ConfigurationError(f"{target} returned inputs of type {type(inputs).__name__}; {_EXPECTED}")


def _called(target: str) -> object:
    """What the target's function returns."""
    name, colon, path = target.partition(":")
    if not colon or not name or not path:
        raise ConfigurationError(
            f"the target must be module:function, such as models.gpt:build, got {target!r}"
        )
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found: Any = importlib.import_module(name)
    except Exception as error:
        raise ConfigurationError(
            f"cannot import {name} from {folder} or what is installed: {type(error).__name__}: {error}"
        ) from error
    for part in path.split("."):
        if not hasattr(found, part):
            where = getattr(found, "__name__", name)
            raise ConfigurationError(f"{where} has no {part!r}: the target {target!r} names no function")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigurationError(f"{target} is no function, but {type(found).__name__}; {_EXPECTED}")
    build: Callable[[], object] = found
    try:
        return build()
    except Exception as error:
        raise ConfigurationError(
            f"{target} raised {type(error).__name__}: {error}. It is called without arguments; {_EXPECTED}"
        ) from error


@contextmanager
def _forward_of(target: str) -> Iterator[None]:
    try:
        yield
    except ConfigurationError:
        raise
    except Exception as error:
        raise ConfigurationError(
            f"the model of {target} raised {type(error).__name__} with the inputs of {target}: {error}"
        ) from error


def _is_lazy(model: nn.Module) -> bool:
    return any(torch.nn.parameter.is_lazy(t) for t in (*model.parameters(), *model.buffers()))


def _libraries() -> dict[str, str]:
    """Versions of what may attend, where it was imported."""
    found = {}
    for name in _LIBRARIES:
        if name in sys.modules:
            try:
                found[name] = version(name.replace("_", "-"))
            except PackageNotFoundError:
                found[name] = "unknown"
    return found
