"""What torch functions do to a linear map's output, by their names."""

from __future__ import annotations

from typing import Any

ADDITIONS = frozenset({"add", "__add__", "__radd__"})
SUMS = ADDITIONS | {"add_", "__iadd__", "sub", "sub_", "__sub__", "__rsub__", "__isub__", "lerp"}
JOINS = frozenset({"cat", "concat", "concatenate"})
FRESH = frozenset(
    {"empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"}
    | {"new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"}
)
MIXING = frozenset(
    {"conv1d", "conv2d", "conv3d", "bilinear", "cumsum", "fft", "rfft", "tensordot", "inner", "matmul", "bmm"}
    | {"amax", "amin", "max", "min", "max_pool1d", "max_pool2d", "max_pool3d"}
    | {"all_gather_into_tensor", "all_reduce", "reduce_scatter_tensor", "all_to_all_single"}
)
TIMES = frozenset({"mul", "multiply", "__mul__", "__rmul__"})
OVER = frozenset({"div", "divide", "true_divide", "__truediv__"})
KEEPING = frozenset(
    {"view", "reshape", "flatten", "unflatten", "transpose", "permute", "contiguous", "clone", "to", "float"}
    | {"type", "type_as", "bfloat16", "half", "detach", "squeeze", "unsqueeze", "double", "__get__"}
)


def factor_after(name: str, args: tuple[Any, ...], factor: float | None) -> float | None:
    """The factor of an origin after one more function; None where that did more than multiply."""
    if factor is None or name in KEEPING:
        return factor
    number: int | float = next((a for a in args if isinstance(a, (int, float))), 0)
    if len(args) != 2 or number == 0:
        return None
    if name in TIMES:
        return factor * number
    return factor / number if name in OVER and args[1] is number else None
