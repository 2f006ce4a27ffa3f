"""What is known of the tensors at the place where attention is called: all that a source may ask."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from entropy_monitor.hooks.arrangement import Arrangement, choose, possible_arrangements
from entropy_monitor.hooks.features import is_inner
from entropy_monitor.hooks.lineage import Origin
from entropy_monitor.hooks.linears import LinearMap
from entropy_monitor.hooks.logits import Logits
from entropy_monitor.hooks.trace import Trace


class Site(Protocol):
    """Answers to a source's questions.

    In eager mode they come from the trace of the forward. In compiled code they are found when it is
    compiled, and given again whenever it runs.

    Attributes:
        heads: how many heads the modules around say they have, if they do.
        by_hand: whether the user named one of these modules as computing attention.
    """

    @property
    def heads(self) -> int | None:
        """See the class."""

    @property
    def by_hand(self) -> bool:
        """See the class."""

    def origin_of(self, tensor: Tensor) -> Origin | None:
        """Which linear map a tensor comes from."""

    def root_of(self, tensor: Tensor) -> LinearMap | None:
        """The linear map that a tensor is a view of the output of."""

    def logits_of(self, tensor: Tensor) -> Logits | None:
        """The product of two activations that a tensor was made from."""

    def is_inner(self, tensor: Tensor, dim: int) -> bool | None:
        """Whether a dimension runs over a linear map's features, not its rows; None if memory is silent."""

    def arrange(self, queries: Tensor, origin: Origin | None) -> Arrangement:
        """Which leading dimensions of queries are sequences, and which are heads."""

    def kernel_dtype(self, tensor: Tensor) -> torch.dtype:
        """The dtype that a fused kernel gets a tensor in: autocast may change it on the way."""

    def settle(self, question: Hashable, look: Callable[[], Any]) -> Any:
        """The answer to a question that only values tell: looked at once, since that waits for the device."""


@dataclass
class EagerSite:
    """The site of a call in a forward that runs eagerly."""

    trace: Trace
    heads: int | None
    by_hand: bool

    def origin_of(self, tensor: Tensor) -> Origin | None:
        """See `Site`."""
        return self.trace.lineage.origin_of(tensor)

    def root_of(self, tensor: Tensor) -> LinearMap | None:
        """See `Site`."""
        return self.trace.lineage.root_of(tensor)

    def logits_of(self, tensor: Tensor) -> Logits | None:
        """See `Site`."""
        return self.trace.logits_of(tensor)

    def is_inner(self, tensor: Tensor, dim: int) -> bool | None:
        """See `Site`."""
        root = self.trace.lineage.root_of(tensor)
        return None if root is None else is_inner(tensor.shape[dim], tensor.stride(dim), root)

    def arrange(self, queries: Tensor, origin: Origin | None) -> Arrangement:
        """See `Site`."""
        lineage = self.trace.lineage
        possible = possible_arrangements(queries, lineage.root_of(queries), origin, self.heads)
        return choose(possible, queries, origin, lineage.settled)

    def kernel_dtype(self, tensor: Tensor) -> torch.dtype:
        """See `Site`."""
        device = tensor.device.type
        if device == "meta":  # which knows no autocast
            return tensor.dtype
        if torch.is_autocast_enabled(device) and tensor.dtype == torch.float32:
            return torch.get_autocast_dtype(device)
        return tensor.dtype

    def settle(self, question: Hashable, look: Callable[[], Any]) -> Any:
        """See `Site`."""
        settled = self.trace.lineage.settled
        if question not in settled:
            settled[question] = look()
        return settled[question]
