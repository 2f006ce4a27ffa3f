"""What `probe_homogeneity` measured, as tables and as text."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

_LINES = 12  # of a table, as text


@dataclass(frozen=True)
class ModuleDegree:
    """The degree of what one call of a module gives: of its first floating tensor.

    Attributes:
        module: qualified name.
        call: which call of it in a forward, from 0.
        degree: k; NaN for a tensor of zeros, which has every degree.
        residual: how far it is from homogeneous, relative to its norm.
    """

    module: str
    call: int
    degree: float
    residual: float


@dataclass(frozen=True)
class Break:
    """A part that is not homogeneous, though all that it was given is.

    Attributes:
        module: qualified name, or "loss_fn" for what is computed outside the model.
        kind: its class.
        where: which tensor of its own making is not homogeneous, the first one.
        degree: the power of the scale that fits best.
        residual: how far that is from fitting, relative to the tensor's norm.
        meets: what the module's code had at hand, and the degree of each.
        why: a sentence.
    """

    module: str
    kind: str
    where: str
    degree: float
    residual: float
    meets: tuple[tuple[str, float], ...]
    why: str


@dataclass(frozen=True)
class GroupDegree:
    """The degree in one group of parameters, all others held.

    Attributes:
        name: of the group; of the module that owns the parameters.
        degree: k; NaN where the result is 0 throughout.
        residual: the largest `‖f(c x) - c^k f(x)‖ / ‖f(c x)‖` over the scales.
        homogeneous: whether that is at most `rtol`.
        parameters: how many numbers it holds.
    """

    name: str
    degree: float
    residual: float
    homogeneous: bool
    parameters: int


@dataclass(frozen=True)
class Homogeneity:
    """What `probe_homogeneity` measured; `print` it.

    Attributes:
        degree: k of the whole; 0 is scale-invariant. NaN where the result is 0 throughout.
        residual: the largest `‖f(c x) - c^k f(x)‖ / ‖f(c x)‖` over the scales.
        homogeneous: whether that is at most `rtol`.
        groups: the degree in each group alone.
        breaks: the parts that are not homogeneous, in order of execution: the first is to be mended first,
            for the degrees at which later ones are judged suppose that those before are mended.
        modules: the degree of what each module gives.
        zeros: names of scaled parameters that are all 0. What they would break does not show, as 0 times c
            is 0: a bias that starts at 0 is one.
        frozen: names of parameters that are not trained, and were not scaled with the whole.
        scales: c.
        rtol: what counts as homogeneous.
    """

    degree: float
    residual: float
    homogeneous: bool
    groups: tuple[GroupDegree, ...]
    breaks: tuple[Break, ...]
    modules: tuple[ModuleDegree, ...] = field(repr=False)
    zeros: tuple[str, ...]
    frozen: tuple[str, ...]
    scales: tuple[float, ...]
    rtol: float

    def __str__(self) -> str:
        if self.homogeneous:
            what = f"homogeneous of degree {shown(self.degree)}"
            if abs(self.degree) <= self.rtol:
                what += ": scale-invariant"
        else:
            what = f"not homogeneous (the best fit is degree {shown(self.degree)})"
        lines = [f"{what}; residual {self.residual:.1e} at scales {', '.join(f'{c:g}' for c in self.scales)}"]
        if self.breaks:
            lines.append("parts that break it:" if not self.homogeneous else "parts that do not show in it:")
            lines += _cut([_line(b) for b in self.breaks])
        if self.groups:
            width = min(40, max(len(g.name) for g in self.groups))
            lines.append("each group alone:")
            lines += _cut(
                [
                    f"  {g.name:<{width}}  degree {shown(g.degree):>6}  residual {g.residual:.1e}"
                    + ("" if g.homogeneous else "  not homogeneous")
                    for g in self.groups
                ]
            )
        if self.zeros:
            some = ", ".join(self.zeros[:5]) + (", …" if len(self.zeros) > 5 else "")
            lines.append(f"all 0, so that what they break does not show yet: {some}")
        if self.frozen:
            lines.append(f"not trained, and not scaled: {len(self.frozen)} parameters")
        return "\n".join(lines)


def _line(found: Break) -> str:
    kind = f" ({found.kind})" if found.kind else ""
    return f"  {found.module}{kind}, {found.where}, residual {found.residual:.1e}: {found.why}"


def _cut(lines: list[str]) -> list[str]:
    return lines if len(lines) <= _LINES else [*lines[:_LINES], f"  … {len(lines) - _LINES} more"]


def shown(degree: float) -> str:
    """A degree as people write it."""
    if not math.isfinite(degree):
        return "any" if math.isnan(degree) else str(degree)
    text = f"{degree:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text
