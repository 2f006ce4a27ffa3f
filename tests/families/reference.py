"""What a model's attention is: its own eager forward in float64, every softmax of which is kept."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_HIDDEN = -1e9  # eager masks hold float64's lowest value, or -inf; a mask of -100 (Swin) is a bias


@dataclass(frozen=True)
class DenseCall:
    """One attention call, float64.

    Attributes:
        logits: `[B, H, T, S]` as they enter the softmax.
        maps: `[B, H, T, S]`, the softmax of them.
    """

    logits: Tensor
    maps: Tensor

    @property
    def visible(self) -> Tensor:
        """`[B, H, T, S]`: which keys a row sees."""
        return self.logits > _HIDDEN

    @property
    def valid(self) -> Tensor:
        """`[B, H, T]`: which rows see any."""
        return self.visible.any(-1)

    def figures(self) -> dict[str, Tensor]:
        """`rows_read`, `entropy`, `max_entropy` (nats) and `max_logit` of each head, `[H]`."""
        valid = self.valid.double()
        count = valid.sum((0, 2))
        entropy = torch.special.entr(self.maps).sum(-1)
        most = self.visible.sum(-1).clamp(min=1).double().log()
        return {
            "rows_read": count,
            "entropy": (entropy * valid).sum((0, 2)) / count,
            "max_entropy": (most * valid).sum((0, 2)) / count,
            "max_logit": self.logits.amax((0, 2, 3)),
        }


def dense_calls(model: nn.Module, inputs: dict[str, Tensor]) -> list[DenseCall]:
    """Every attention call of an eager model's forward, in order of execution."""
    model = copy.deepcopy(model).double().eval()
    inputs = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped one does not know float64
    for module in model.modules():
        if hasattr(module, "reorder_and_upcast_attn"):
            module.reorder_and_upcast_attn = False  # casts to float32; the same function otherwise
    options = {"output_attentions": True} if hasattr(model, "config") else {}
    with torch.no_grad(), _softmaxes() as kept:
        output = model(**inputs, **options)
    calls = [DenseCall(logits, maps) for logits, maps in kept if logits.dim() == 4]  # the others route tokens
    if options:
        _agrees(output, calls)
    return calls


def _agrees(output: Any, calls: list[DenseCall]) -> None:
    """The maps that the model itself returns (Swin: of its last blocks) are those that were kept."""
    names = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")
    told = [maps for name in names for maps in output.get(name) or ()]
    assert told
    for maps in told:
        assert sum(maps.shape == c.maps.shape and torch.allclose(maps, c.maps) for c in calls) == 1


@contextmanager
def _softmaxes() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Keep what every softmax is given and makes of it, in float64 even where its caller asks for less."""
    kept: list[tuple[Tensor, Tensor]] = []

    def softmax(x: Tensor, dim: int = -1, *args: Any, **kwargs: Any) -> Tensor:
        weights = (x.double() - x.double().amax(dim, keepdim=True)).exp()
        maps = weights / weights.sum(dim, keepdim=True)
        kept.append((x.double().clone(), maps))
        return maps.to(x.dtype)

    places = [(nn.functional, "softmax"), (torch, "softmax"), (Tensor, "softmax")]
    originals = [getattr(place, name) for place, name in places]
    for place, name in places:
        setattr(place, name, softmax)
    try:
        yield kept
    finally:
        for (place, name), original in zip(places, originals, strict=True):
            setattr(place, name, original)
