"""Products of two tensors, in the spellings that attention logits and linear maps come in."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.mm, Tensor.mm)
_REVERSED = (Tensor.__rmatmul__,)
_ADDED = (torch.baddbmm, Tensor.baddbmm, Tensor.baddbmm_)
FUNCTIONS: frozenset[Callable[..., Any]] = frozenset(
    {*_MATMULS, *_REVERSED, *_ADDED, torch.einsum, torch.ops.aten.matmul, torch.ops.aten.bmm}
)


@dataclass(frozen=True)
class Contraction:
    """`einsum("left_names,right_names->out", left, right)` over one index.

    Attributes:
        left: first operand.
        right: second operand.
        left_names: a letter for each of its dimensions.
        right_names: likewise.
        out: likewise, of the result.
        contracted: the index summed over.
    """

    left: Tensor
    right: Tensor
    left_names: str
    right_names: str
    out: str
    contracted: str

    @property
    def left_rows(self) -> Tensor | None:
        """The first operand as `[..., contracted]`; None where it would have to be permuted."""
        return self.left if self.left_names[-1] == self.contracted else None

    def operand(self, name: str) -> tuple[Tensor, str] | None:
        """The operand that alone has a dimension, and its names; None if both have it or none."""
        if (name in self.left_names) == (name in self.right_names):
            return None
        return (self.left, self.left_names) if name in self.left_names else (self.right, self.right_names)


def contraction_of(func: Callable[..., Any], args: tuple[Any, ...]) -> Contraction | None:
    """The product that a function was called for; None if it is none of two tensors over one index."""
    if func is torch.einsum:
        return _einsum(args)
    if func in _ADDED:
        args = args[1:]
    elif func in _REVERSED:
        args = args[1::-1]
    if len(args) < 2:
        return None
    left, right = args[:2]
    if not isinstance(left, Tensor) or not isinstance(right, Tensor) or min(left.dim(), right.dim()) < 2:
        return None
    lead = string.ascii_lowercase[: max(left.dim(), right.dim()) - 2]
    names = [lead[len(lead) - x.dim() + 2 :] for x in (left, right)]
    return Contraction(left, right, names[0] + "XZ", names[1] + "ZY", lead + "XY", "Z")


def is_weight(tensor: Tensor) -> bool:
    """Whether a tensor is a model's weight (a parameter or a view of one) and no activation."""
    base = tensor if tensor._base is None else tensor._base
    return tensor.dim() in (2, 3) and isinstance(base, nn.Parameter)


def is_attention_product(contraction: Contraction) -> bool:
    """Whether a product may be one of queries and keys: both are activations.

    Queries may be learned, `[1, T, D]`; a matrix is always taken for a weight.
    """
    left, right = contraction.left, contraction.right
    return not is_weight(right) and not (is_weight(left) and left.dim() == 2)


def _einsum(args: tuple[Any, ...]) -> Contraction | None:
    if len(args) == 2 and isinstance(args[1], (list, tuple)):
        args = (args[0], *args[1])
    if len(args) != 3 or not isinstance(args[0], str):
        return None
    equation, left, right = args
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return None
    names, arrow, out = equation.replace(" ", "").partition("->")
    a, _, b = names.partition(",")
    if not arrow:
        out = "".join(sorted(n for n in set(names) if names.count(n) == 1 and n.isalpha()))
        out = ("..." if "..." in names else "") + out
    unused = [n for n in string.ascii_letters if n not in names]
    a, b = _spelled(a, left.dim(), unused), _spelled(b, right.dim(), unused)
    out = _spelled(out, len(out) - 3 + max(_dots(equation, left, right)), unused) if "..." in out else out
    contracted = (set(a) & set(b)) - set(out)
    if len(contracted) != 1 or len(set(a)) != len(a) or len(set(b)) != len(b):
        return None
    if (set(a) | set(b)) - set(out) != contracted:
        return None
    return Contraction(left, right, a, b, out, contracted.pop())


def _dots(equation: str, *operands: Tensor) -> list[int]:
    """How many dimensions `...` stands for in each operand."""
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    return [x.dim() - (len(t) - 3) if "..." in t else 0 for t, x in zip(terms, operands, strict=True)]


def _spelled(term: str, dims: int, unused: Sequence[str]) -> str:
    """A term with letters in place of `...`; from the right, as it broadcasts."""
    if "..." not in term:
        return term
    n = dims - (len(term) - 3)
    return term.replace("...", "".join(reversed(unused[:n])))
