"""Reads a forward by what earlier ones showed: whose each attention call is.

Following tensors from function to function tells whose an attention call is and which weights made its
queries and keys. Where rows alone are to be read, of a forward like those that were followed, the first is
known and the second not needed: functions that are no attention are left alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from entropy_monitor.hooks.calls import AttentionCall, Receiver, Seen
from entropy_monitor.hooks.lineage import Lineage
from entropy_monitor.hooks.scope import Scope
from entropy_monitor.hooks.site import EagerSite
from entropy_monitor.hooks.sources import Source, multihead, sdpa, softmax, source_of
from entropy_monitor.hooks.trace import Trace

_BATCH_HEADS_TOKENS_FEATURES = 4


@dataclass(frozen=True)
class Known:
    """What is known of an attention call without following tensors.

    Attributes:
        source: the function's name.
        form: query heads, head size and key heads.
        layer: the owner's name.
        first_head: see `AttentionCall`.
    """

    source: str
    form: tuple[int, ...]
    layer: str
    first_head: int

    def fits(self, seen: Seen) -> bool:
        """Whether a call may be this one."""
        return (self.source, self.form) == (seen.source, _form(seen))


@dataclass
class Followed:
    """What forwards showed while their tensors were followed.

    Attributes:
        calls: by the innermost running module, and the number of its calls before.
        suffices: whether nothing was seen that only following tensors tells.
    """

    calls: dict[tuple[nn.Module, int], Known] = field(default_factory=dict)
    suffices: bool = True

    def note(self, place: tuple[nn.Module, int], seen: Seen, layer: str, first_head: int) -> None:
        """Note whose a call is."""
        self.calls[place] = Known(seen.source, _form(seen), layer, first_head)

    def add(self, other: Followed) -> None:
        """Add what another forward showed."""
        self.calls.update(other.calls)
        self.suffices &= other.suffices


def tells_all(source: Source, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call's arguments tell its logits and its heads: nothing before it has to be known."""
    if source is multihead:
        return True
    query = args[0] if args else kwargs.get("query")
    return source is sdpa and isinstance(query, Tensor) and query.dim() == _BATCH_HEADS_TOKENS_FEATURES


class Recall:
    """Reads one forward; the counterpart of `Observer`.

    Args:
        followed: what earlier forwards showed.
        receiver: is told of each call.
        settled: see `Lineage`.

    Attributes:
        scopes: the forwards that are running.
        missed: whether a call was not read, for it was not known.
    """

    follows = False

    def __init__(self, followed: Followed, receiver: Receiver, settled: dict[Hashable, Any]) -> None:
        self.scopes: list[Scope] = []
        self.missed = False
        self._followed = followed
        self._receiver = receiver
        self._trace = Trace(settled)  # stays empty
        self._calls: Counter[str] = Counter()
        self._places: Counter[nn.Module] = Counter()

    @property
    def lineage(self) -> Lineage:
        """Where the tensors of this forward come from: not known."""
        return self._trace.lineage

    def enter(self, module: nn.Module) -> None:
        """A module's forward begins."""
        self.scopes.append(Scope(module))

    def leave(self) -> None:
        """The innermost forward ends."""
        if self.scopes:
            self.scopes.pop()

    def count(self, layer: str) -> int:
        """Attention of compiled code, which is not what was followed; which call of a layer it is, from 0."""
        self.missed = True
        return self._next(layer)

    def await_output(self, layer: str, seen: Seen) -> None:
        """Output projections were found when tensors were followed."""

    def reject(self, why: str) -> None:  # noqa: ARG002  following the next forward will tell
        """Attention of the innermost module cannot be read."""
        self.missed = True

    @torch.no_grad()
    def before(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Attention itself, before it runs."""
        source = source_of(func)
        if source is softmax:
            return  # attention by hand is not among what can be recalled: this is another softmax
        module = self.scopes[-1].module
        known = self._followed.calls.get((module, self._places[module]))
        self._places[module] += 1
        if known is None or not tells_all(source, args, kwargs):
            self.missed = True
            return
        with torch._C.DisableTorchFunction():
            seen = source.read(args, kwargs, EagerSite(self._trace, None, by_hand=False))
            if seen is None or seen.inputs is None or not known.fits(seen):
                self.missed = True
                return
            self._receiver.attention(
                AttentionCall(
                    known.layer,
                    self._next(known.layer),
                    seen.source,
                    seen.inputs,
                    None,
                    None,
                    None,
                    seen.extra_keys,
                    first_head=known.first_head,
                )
            )

    def after(self, *args: Any) -> None:
        """What other functions made is not looked at."""

    def _next(self, layer: str) -> int:
        call = self._calls[layer]
        self._calls[layer] += 1
        return call


def _form(seen: Seen) -> tuple[int, ...]:
    i = seen.inputs
    return () if i is None else (i.q.shape[1], i.q.shape[-1], i.k.shape[1])
