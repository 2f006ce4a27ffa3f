"""Reads a forward by what earlier ones showed: whose each attention call is.

Following tensors from function to function tells whose an attention call is and which weights made its
queries and keys. Where rows alone are to be read, of a forward like those that were followed, the first is
known and the second not needed: functions that are no attention are left alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from entropy_monitor.guard import Guard
from entropy_monitor.hooks.calls import AttentionCall, Receiver, Seen
from entropy_monitor.hooks.lineage import Lineage
from entropy_monitor.hooks.scope import Scope
from entropy_monitor.hooks.site import EagerSite
from entropy_monitor.hooks.sources import Source, multihead, sdpa, softmax, source_of
from entropy_monitor.hooks.trace import Trace
from entropy_monitor.hooks.unread import UnreadError

Path = tuple[nn.Module, ...]
"""The modules that are running, the outermost first; those that are no torch layers."""

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
        calls: by what was running, and the number of calls there before.
        others: where a softmax ran that was no attention.
        suffices: whether nothing was seen that only following tensors tells.
        is_outdated: whether a forward was not like these since.
    """

    calls: dict[tuple[Path, int], Known] = field(default_factory=dict)
    others: set[Path] = field(default_factory=set)
    suffices: bool = True
    is_outdated: bool = False

    @property
    def tells(self) -> bool:
        """Whether the next forward need not be followed."""
        return self.suffices and not self.is_outdated and bool(self.calls)

    def note(self, place: tuple[Path, int], seen: Seen, layer: str, first_head: int) -> None:
        """Note whose a call is."""
        self._note(place, Known(seen.source, _form(seen), layer, first_head))

    def add(self, other: Followed) -> None:
        """Add what another forward showed."""
        for place, known in other.calls.items():
            self._note(place, known)
        self.others |= other.others
        self.suffices &= other.suffices
        self.is_outdated = False

    def _note(self, place: tuple[Path, int], known: Known) -> None:
        """One place that has been another layer's in another forward tells nothing."""
        self.suffices &= self.calls.setdefault(place, known) == known


def path_of(scopes: Sequence[Scope]) -> Path:
    """What is running."""
    return tuple(scope.module for scope in scopes)


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
        guard: keeps a fault of one layer to that layer.
        settled: see `Lineage`.

    Attributes:
        scopes: the forwards that are running.
        missed: whether a call was not known: neither it nor what comes after it is read.
    """

    follows = False

    def __init__(
        self, followed: Followed, receiver: Receiver, guard: Guard, settled: dict[Hashable, Any]
    ) -> None:
        self.scopes: list[Scope] = []
        self.missed = False
        self._followed = followed
        self._receiver = receiver
        self._guard = guard
        self._trace = Trace(settled)  # stays empty
        self._calls: Counter[str] = Counter()
        self._places: Counter[Path] = Counter()

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
        if self.missed:
            return
        source, path = source_of(func), path_of(self.scopes)
        if source is softmax and path in self._followed.others:
            return
        known = self._followed.calls.get((path, self._places[path]))
        self._places[path] += 1
        call = None if known is None else self._recognised(known, source, args, kwargs)
        if call is None:
            self.missed = True
        else:
            self._guard.run(f"reading {call.layer}", self._receiver.attention, call)

    def end(self) -> None:
        """The forward ended."""
        self._followed.is_outdated |= self.missed or not self._places

    def _recognised(
        self, known: Known, source: Source, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> AttentionCall | None:
        """A call that is what it was."""
        if not tells_all(source, args, kwargs):
            return None
        with torch._C.DisableTorchFunction():
            try:
                seen = source.read(args, kwargs, EagerSite(self._trace, None, by_hand=False))
            except UnreadError:
                return None
        if seen is None or not known.fits(seen):
            return None
        return AttentionCall(
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

    def after(self, *args: Any) -> None:
        """What other functions made is not looked at."""

    def _next(self, layer: str) -> int:
        call = self._calls[layer]
        self._calls[layer] += 1
        return call


def _form(seen: Seen) -> tuple[int, ...]:
    i = seen.inputs
    return () if i is None else (i.q.shape[1], i.q.shape[-1], i.k.shape[1])
