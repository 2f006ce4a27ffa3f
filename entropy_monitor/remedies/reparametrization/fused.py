"""Which rows of a fused weight make queries, keys and values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.guard import Guard
from entropy_monitor.hooks import Watcher
from entropy_monitor.hooks.calls import AttentionCall, Role
from entropy_monitor.hooks.projections import Layout, Projection
from entropy_monitor.hooks.sharding import is_sharded
from entropy_monitor.remedies.selection import LayerWeight, Selection
from entropy_monitor.undisturbed import run_eagerly, unchanged

Fused = Literal["joint", "qk_v", "each"]
"""How weights that join queries, keys and values are treated: as one, values apart, or all apart."""

_PARTS: dict[str, tuple[int, int, int]] = {"qk_v": (0, 0, 1), "each": (0, 1, 2)}
_JOINED_NAMES = re.compile(r"qkv|c_attn|query_key_value|in_proj", re.IGNORECASE)


def find_groups(
    model: nn.Module, selection: Selection, fused: Fused, example_inputs: Any, remedy: str
) -> dict[str, Tensor]:
    """The group of every line of each fused weight, by the weight's label; nothing for those treated as one.

    Args:
        model: whose weights they are.
        selection: those to treat.
        fused: how.
        example_inputs: of the model, to run it and follow its queries and keys; see `sigma_reparam`.
        remedy: for errors.

    Returns:
        Integer tensors `[out, 1]`, or `[1, out]` for weights stored as `[in, out]`.

    Raises:
        ConfigurationError: if the parts of a weight cannot be told.
    """
    if fused == "joint":
        return {}
    if fused not in _PARTS:
        raise ConfigurationError(f"{remedy}: fused must be 'joint', 'qk_v' or 'each', got {fused!r}")
    numbers = _PARTS[fused]
    seen = {} if example_inputs is None else _follow(model, example_inputs, remedy)
    groups = {}
    for weight in selection.weights:
        parts = _parts(weight, seen, remedy)
        if parts is None:
            continue
        found = sorted({numbers[part] for part in parts})
        if len(found) > 1:
            lines = [found.index(numbers[part]) for part in parts]
            index = torch.tensor(lines, device=weight.value.device)
            groups[weight.label] = index[None, :] if weight.form == "transposed" else index[:, None]
    return groups


def _parts(weight: LayerWeight, seen: Mapping[int, Mapping[Role, Layout]], remedy: str) -> list[int] | None:
    """0 (query), 1 (key) or 2 (the rest) for each output feature; None for a weight that is not fused."""
    joined = weight.fused or _JOINED_NAMES.search(weight.name.rpartition(".")[-1])
    if joined and is_sharded(weight.value):
        raise ConfigurationError(
            f"{remedy}: {weight.label} is split over processes, where its queries, keys and values cannot be "
            "told apart; give fused='joint', or leave the layer out with layers=…"
        )
    out = weight.matrix().shape[0]
    if weight.fused:
        third = out // len(weight.fused)
        return [feature // third for feature in range(out)]
    layouts = seen.get(id(weight.value))
    if layouts is not None:
        parts = [2] * out
        for role, layout in layouts.items():
            for feature in _features(layout):
                parts[feature] = ("query", "key").index(role)
        return parts
    if joined:
        raise ConfigurationError(
            f"{remedy}: {weight.label} {tuple(weight.value.shape)} seems to join queries, keys and "
            "values, and how they lie in it is not known; give example_inputs=(…) for one forward to find "
            "out, or fused='joint'"
        )
    return None


def _features(layout: Layout) -> list[int]:
    inner = layout.heads // layout.groups
    return [
        layout.base + g * layout.group_stride + h * layout.head_stride + j * layout.stride
        for g in range(layout.groups)
        for h in range(inner)
        for j in range(layout.head_size)
    ]


def _follow(model: nn.Module, inputs: Any, remedy: str) -> dict[int, dict[Role, Layout]]:
    """Run the model once and note which features of which parameter are queries and keys."""
    receiver = _Receiver()
    watcher = Watcher(model, receiver, Guard())
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (_as_tuple(inputs), {})
    watcher.arm()
    try:
        with run_eagerly(model), unchanged(model), torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:
        raise ConfigurationError(
            f"{remedy}: the model could not be run on example_inputs: {type(error).__name__}: {error}"
        ) from error
    finally:
        watcher.disarm()
    return receiver.layouts


def _as_tuple(inputs: Any) -> tuple[Any, ...]:
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


class _Receiver:
    """Keeps where queries and keys lie."""

    def __init__(self) -> None:
        self.layouts: dict[int, dict[Role, Layout]] = {}

    def expect(self, calls: Sequence[tuple[str, int]]) -> None:
        """See `Receiver`."""

    def attention(self, call: AttentionCall) -> None:
        """See `Receiver`."""
        for role, projection in (("query", call.query), ("key", call.key)):
            if projection is not None:
                self.projection(call.layer, role, projection)  # type: ignore[arg-type]

    def projection(self, layer: str, role: Role, projection: Projection) -> None:  # noqa: ARG002
        """See `Receiver`."""
        if role in ("query", "key") and len(projection.parameters) == 1:
            self.layouts.setdefault(id(projection.parameters[0]), {})[role] = projection.layout

    def retract(self, layer: str, role: Role) -> None:
        """See `Receiver`."""
