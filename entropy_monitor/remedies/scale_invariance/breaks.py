"""Which part of a model is not homogeneous: what every module is given and gives, under scaled parameters.

Where a tensor under scaled parameters is no power of the scale times what it was, the module whose own code
made it is to blame. The tensor is then mended, that is replaced by what it was times the nearest whole power,
and the forward goes on: so every part is judged on its own, and one that breaks does not hide the next.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from entropy_monitor.hooks import module_names
from entropy_monitor.hooks.structure import attention_owners
from entropy_monitor.remedies.scale_invariance.report import Break, ModuleDegree, shown

LOSS = "loss_fn"


_Key = tuple[str, int, str, int]  # module, call, "in" or "out", which tensor


@dataclass
class _Frame:
    """A forward that runs, and the tensors that its code has at hand."""

    name: str
    module: nn.Module | None
    call: int
    known: dict[str, _Key] = field(default_factory=dict)


@dataclass
class _Blamed:
    frame: _Frame
    where: str
    key: _Key
    known: dict[str, _Key]


class Fit:
    """One tensor under several scales, compared with what it was under scale 1."""

    def __init__(self) -> None:
        self._points: list[tuple[float, float, float]] = []  # log of the scale, log of the ratio, residual

    def add(self, scale: float, now: Tensor, before: Tensor) -> None:
        """Add what the tensor is under a scale."""
        self._points.append((math.log(scale), *_compared(now, before)))

    @property
    def degree(self) -> float:
        """By least squares; NaN where the tensor is 0 throughout."""
        points = [p for p in self._points if math.isfinite(p[1])]
        return sum(x * y for x, y, _ in points) / sum(x * x for x, _, _ in points) if points else math.nan

    @property
    def residual(self) -> float:
        """The largest `‖y(c) - c^k y(1)‖ / ‖y(c)‖`."""
        degree, worst = self.degree, 0.0
        for x, y, apart in self._points:
            off = math.expm1(min(degree * x - y, 500.0)) if math.isfinite(y) else 0.0
            worst = max(worst, math.hypot(apart, off))
        return worst


def _compared(now: Tensor, before: Tensor) -> tuple[float, float]:
    """`log ‖now‖/‖before‖`, NaN if both are 0, and what is left when `before` is scaled to that norm."""
    if not (now.is_floating_point() or now.is_complex()):
        return (0.0, 0.0) if torch.equal(now, before) else (math.nan, math.inf)
    a, b = _as_double(now), _as_double(before)
    finite = a.isfinite() & b.isfinite()
    if not finite.all():
        alike = finite | (a == b) | (a.isnan() & b.isnan())
        if not alike.all() or not finite.any():
            return math.nan, math.inf if not alike.all() else 0.0
        a, b = a[finite], b[finite]
    size, was = float(torch.linalg.vector_norm(a)), float(torch.linalg.vector_norm(b))
    if size == 0 or was == 0:
        return math.nan, 0.0 if size == was else math.inf
    apart = float(torch.linalg.vector_norm(a - b * (size / was))) / size
    return math.log(size) - math.log(was), apart


def _as_double(tensor: Tensor) -> Tensor:
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


class Breaks:
    """Runs a function of a model under one scale after another, scale 1 first, and finds what breaks.

    Args:
        model: that the function runs.
        rtol: what counts as homogeneous.
    """

    def __init__(self, model: nn.Module, rtol: float) -> None:
        self._model = model
        self._rtol = rtol
        self._names = module_names(model)
        self._owners = set(attention_owners(model))
        self._reference: dict[_Key, Tensor] = {}
        self._fits: dict[_Key, Fit] = {}
        self._degrees: dict[_Key, float] = {}
        self._blamed: dict[str, _Blamed] = {}
        self._first: dict[tuple[str, int], _Key] = {}  # floating output of each call
        self._counts: Counter[str] = Counter()
        self._frames: list[_Frame] = []
        self._scale = 1.0

    def run(self, loss_fn: Callable[[], Tensor], scale: float) -> None:
        """Run it under a scale; the parameters have it already."""
        self._scale = scale
        self._counts.clear()
        self._frames = [_Frame(LOSS, None, 0)]
        with self._hooked():
            result = loss_fn()
        key: _Key = (LOSS, 0, "out", 0)
        _, broken = self._look(key, result)
        if broken:
            self._blame(self._frames[0], key, "what it returns")

    def found(self) -> tuple[Break, ...]:
        """The parts that break, in order of execution."""
        place = {key: index for index, key in enumerate(self._reference)}
        blamed = sorted(self._blamed.values(), key=lambda found: place[found.key])
        return tuple(map(self._described, blamed))

    def modules(self) -> list[ModuleDegree]:
        """The degree of what each call of a module gives, in order of execution."""
        return [
            ModuleDegree(key[0], key[1], self._fits[key].degree, self._fits[key].residual)
            for key in self._first.values()
            if key in self._fits
        ]

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        with ExitStack() as stack:
            for module in self._names:
                if isinstance(module, torch.jit.ScriptModule):
                    continue
                before = module.register_forward_pre_hook(self._before, with_kwargs=True)
                stack.callback(before.remove)
                after = module.register_forward_hook(self._after, with_kwargs=True)
                stack.callback(after.remove)
            yield

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        name = self._names[module]
        frame = _Frame(name, module, self._counts[name])
        self._counts[name] += 1
        mended = self._all((args, kwargs), frame, "in", self._frames[-1], f"what it gives to {name}")
        self._frames.append(frame)
        return mended

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:  # noqa: ARG002
        frame = self._frames.pop()
        while frame.module is not module:  # one that raised, and whose error the model caught
            frame = self._frames.pop()
        return self._all(output, frame, "out", frame, "what it returns")

    def _all(self, value: Any, frame: _Frame, side: str, maker: _Frame, where: str) -> Any:
        """Look at all tensors that a module is given or gives; the mended value, None if nothing was."""
        index = -1
        changed = False

        def look(tensor: Tensor) -> Tensor:
            nonlocal index, changed
            index += 1
            key = (frame.name, frame.call, side, index)
            mended, broken = self._look(key, tensor)
            if broken:
                changed = True
                self._blame(maker, key, where)
            if tensor.is_floating_point():
                if side == "in":
                    frame.known[f"input[{index}]" if index else "input"] = key
                else:
                    self._first.setdefault((frame.name, frame.call), key)
                    call = f", call {frame.call}" if frame.call else ""
                    self._frames[-1].known.setdefault(f"{_below(frame, self._frames[-1])}{call}", key)
            return mended

        value = _mapped(value, look)
        return value if changed else None

    def _look(self, key: _Key, tensor: Tensor) -> tuple[Tensor, bool]:
        """Compare a tensor with what it was under scale 1; the mended tensor, and whether it broke."""
        tensor = tensor.detach()
        if self._scale == 1.0:
            self._reference[key] = tensor.clone()
            return tensor, False
        before = self._reference.get(key)
        if before is None or before.shape != tensor.shape or before.dtype != tensor.dtype:
            return tensor, False  # the forward took another way
        self._fits.setdefault(key, Fit()).add(self._scale, tensor, before)
        here = Fit()
        here.add(self._scale, tensor, before)
        degree, apart = here.degree, here.residual
        known = self._degrees.get(key)
        if known is not None and math.isfinite(degree):
            apart = max(apart, abs(math.expm1(min((degree - known) * math.log(self._scale), 500.0))))
        if apart <= self._rtol:
            if math.isfinite(degree):
                self._degrees.setdefault(key, degree)
            return tensor, False
        whole = float(round(degree)) if math.isfinite(degree) else 0.0
        known = self._degrees.setdefault(key, whole)
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return before.clone(), True
        return before * self._scale**known, True

    def _blame(self, maker: _Frame, key: _Key, where: str) -> None:
        if maker.name not in self._blamed:
            self._blamed[maker.name] = _Blamed(maker, where, key, dict(maker.known))

    def _described(self, blamed: _Blamed) -> Break:
        frame, fit = blamed.frame, self._fits[blamed.key]
        meets = tuple(
            (label, self._degrees[key]) for label, key in blamed.known.items() if key in self._degrees
        )
        kind = "" if frame.module is None else type(frame.module).__name__
        why = _reason(frame, meets, frame.name in self._owners)
        return Break(frame.name, kind, blamed.where, fit.degree, fit.residual, meets, why)


def _below(frame: _Frame, around: _Frame) -> str:
    return frame.name.removeprefix(f"{around.name}.")


def _mapped(value: Any, look: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with each tensor replaced; what is no tuple, list or dict is left as it is."""
    if isinstance(value, Tensor):
        return look(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(item, look) for item in value))
    if type(value) in (tuple, list):
        return type(value)(_mapped(item, look) for item in value)
    if isinstance(value, dict):
        items = {name: _mapped(item, look) for name, item in value.items()}
        try:
            return type(value)(**items) if type(value) is not dict else items
        except TypeError:
            return value
    return value


def _reason(frame: _Frame, meets: tuple[tuple[str, float], ...], owner: bool) -> str:
    """Why a module's own code is not homogeneous, as far as its degrees tell."""
    module = frame.module
    at_hand = ", ".join(f"{label}: {shown(degree)}" for label, degree in meets) or "constants: 0"
    if module is None:
        return f"the loss is no homogeneous function of what the model gives ({at_hand})"
    kind = type(module).__name__.lower()
    if owner or "attention" in kind:
        return (
            f"attention ({at_hand}): a softmax is homogeneous only of scores of degree 0, "
            "scale_invariant_attention of any; biases of the projections count too"
        )
    if "norm" in kind:
        return (
            f"a norm ({at_hand}) is homogeneous where its eps is nothing beside its input's variance, and "
            "where it keeps no running statistics"
        )
    own = {n: p for n, p in module.named_parameters(recurse=False) if bool(p.detach().any())}
    degrees = sorted({round(degree, 2) for _, degree in meets})
    biases = [name for name in own if "bias" in name]
    if biases and len(own) > 1 and degrees and all(label.startswith("input") for label, _ in meets):
        made = shown(degrees[-1] + 1)
        return f"its {biases[0]} (degree 1) is added to what its weight makes of its input (degree {made})"
    parameters = f"; own parameters ({', '.join(own)}): 1" if own else ""
    if len(degrees) > 1 or own:
        return f"degrees that differ meet in its forward ({at_hand}{parameters})"
    return (
        f"its function is not homogeneous ({at_hand}): ReLU is, GELU, SiLU, tanh, sigmoid and softmax are not"
    )
