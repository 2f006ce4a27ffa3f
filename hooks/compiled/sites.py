"""Both ends of a source's questions: answers kept when a graph is compiled, given again when it runs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from entropy_monitor.hooks.arrangement import Arrangement, choose, possible_arrangements
from entropy_monitor.hooks.compiled.plan import Plan, Thaw
from entropy_monitor.hooks.lineage import Lineage, Origin
from entropy_monitor.hooks.linears import LinearMap
from entropy_monitor.hooks.logits import Logits
from entropy_monitor.hooks.site import EagerSite


@dataclass
class RecordingSite(EagerSite):
    """An eager site that keeps its answers, by question."""

    answers: list[tuple[str, Any]] = field(default_factory=list)

    def origin_of(self, tensor: Tensor) -> Origin | None:
        """See `Site`."""
        origin = super().origin_of(tensor)
        self.answers.append(("origin_of", origin))
        return origin

    def logits_of(self, tensor: Tensor) -> Logits | None:
        """See `Site`."""
        logits = super().logits_of(tensor)
        self.answers.append(("logits_of", logits))
        return logits

    def is_inner(self, tensor: Tensor, dim: int) -> bool | None:
        """See `Site`."""
        inner = super().is_inner(tensor, dim)
        self.answers.append(("is_inner", inner))
        return inner

    def arrange(self, queries: Tensor, origin: Origin | None) -> Arrangement:
        """See `Site`; which of several possible ones it is, values tell when the graph runs."""
        root = self.trace.lineage.root_of(queries)
        possible = possible_arrangements(queries, root, origin, self.heads)
        self.answers.append(("arrange", possible))
        return possible[0]

    def kernel_dtype(self, tensor: Tensor) -> torch.dtype:
        """See `Site`."""
        dtype = super().kernel_dtype(tensor)
        self.answers.append(("kernel_dtype", dtype))
        return dtype

    def settle(self, question: Hashable, look: Callable[[], Any]) -> Any:  # noqa: ARG002
        """See `Site`: asked again when there are values."""
        return None


class ReplayedSite:
    """Gives the answers that were found when the graph was compiled, in the order of the questions.

    Args:
        plan: of the call.
        thaw: puts the call's tensors into the answers.
        settled: what was found out by looking at values.
        lineage: of the forward that runs eagerly around the graph, which may know what the graph was given.
    """

    def __init__(self, plan: Plan, thaw: Thaw, settled: dict[Hashable, Any], lineage: Lineage | None) -> None:
        self.heads = plan.heads
        self.by_hand = plan.by_hand
        self._answers: Iterator[Any] = iter(plan.answers)
        self._thaw = thaw
        self._settled = settled
        self._lineage = lineage

    def origin_of(self, tensor: Tensor) -> Origin | None:
        """See `Site`."""
        origin: Origin | None = self._answer("origin_of")
        if origin is None and self._lineage is not None:
            return self._lineage.origin_of(tensor)
        return origin

    def root_of(self, tensor: Tensor) -> LinearMap | None:  # noqa: ARG002
        """None: in compiled code a tensor's memory tells nothing of where it comes from."""
        return None

    def logits_of(self, tensor: Tensor) -> Logits | None:  # noqa: ARG002
        """See `Site`."""
        logits: Logits | None = self._answer("logits_of")
        return logits

    def is_inner(self, tensor: Tensor, dim: int) -> bool | None:  # noqa: ARG002
        """See `Site`."""
        inner: bool | None = self._answer("is_inner")
        return inner

    def arrange(self, queries: Tensor, origin: Origin | None) -> Arrangement:
        """See `Site`; what memory did not tell when the graph was compiled, values tell now."""
        return choose(self._answer("arrange"), queries, origin, self._settled)

    def kernel_dtype(self, tensor: Tensor) -> torch.dtype:  # noqa: ARG002
        """See `Site`."""
        dtype: torch.dtype = self._answer("kernel_dtype")
        return dtype

    def settle(self, question: Hashable, look: Callable[[], Any]) -> Any:
        """See `Site`."""
        if question not in self._settled:
            self._settled[question] = look()
        return self._settled[question]

    def _answer(self, question: str) -> Any:
        asked, answer = next(self._answers)
        if asked != question:
            raise RuntimeError(f"the source asked {question} where it had asked {asked} before")
        return self._thaw(answer)
