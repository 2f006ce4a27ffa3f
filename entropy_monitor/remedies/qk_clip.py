"""QK-clip: where a head's logits grew too large, its weights of queries and keys are scaled down."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any, Literal, SupportsIndex

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from entropy_monitor.capture import check_model, check_owners, check_rows
from entropy_monitor.errors import ConfigurationError
from entropy_monitor.guard import Guard
from entropy_monitor.hooks import Watcher
from entropy_monitor.hooks.maps import check_patterns
from entropy_monitor.hooks.names import clean_name
from entropy_monitor.measures._precision import working_dtype
from entropy_monitor.remedies.head_weights import HeadWeights
from entropy_monitor.remedies.largest_logits import LargestLogits, Unit


@dataclass(frozen=True)
class ClippedHead:
    """A head whose weights were scaled.

    Attributes:
        layer: the attention layer's qualified name; of layers that share the weights, the first.
        head: the query head.
        max_logit: its largest logit since the last step, over all processes.
        factor: of its logits from now on, `threshold / max_logit`.
    """

    layer: str
    head: int
    max_logit: float
    factor: float


def qk_clip_(
    query: Tensor,
    key: Tensor | None,
    factors: Tensor,
    *,
    query_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    balance: float = 0.5,
) -> None:
    """Scale the weights of queries and keys in place, so that each head's logits shrink by its factor.

    A factor η is split into η^balance for the query and the rest for the key (QK-Clip of Kimi K2, arXiv
    2507.20534: √η each). Where query heads share a key head, its factor is the largest that they would give
    it, and each query takes what is left of its own η: nothing is ever scaled up, and every head gets
    exactly its η.

    Args:
        query: `[H, d_model, d_head]`, float, views of the parameters, as in `Projections`.
        key: `[K, d_model, d_head]`, K dividing H: query head h shares key head `h // (H / K)`; None leaves
            the keys alone, and the queries take all of η.
        factors: η of each query head, `[H]`, in (0, 1]; 1 changes nothing.
        query_bias: `[H, d_head]`, or None.
        key_bias: `[K, d_head]`, or None.
        balance: share of the query, in [0, 1].

    Raises:
        ConfigurationError: if shapes do not fit or a number is out of its range. Nothing is written.
    """
    _check_balance(balance)
    heads, shared = query.shape[0], 0 if key is None else key.shape[0]
    if factors.shape != (heads,) or not bool(((factors > 0) & (factors <= 1)).all()):
        raise ConfigurationError(
            f"qk_clip_: factors must be {heads} numbers in (0, 1], one for each query head, got "
            f"{factors.tolist()}"
        )
    if key is not None and (shared == 0 or heads % shared):
        raise ConfigurationError(
            f"qk_clip_: the number of key heads must divide that of query heads, got {shared} and {heads}"
        )
    of_query, of_key = split_factors(factors, shared, balance)
    with torch.no_grad():
        for tensor, factor in ((query, of_query), (query_bias, of_query), (key, of_key), (key_bias, of_key)):
            if tensor is not None:
                shaped = factor.view(-1, *[1] * (tensor.dim() - 1))
                dtype = working_dtype(tensor)
                tensor.copy_(tensor.to(dtype) * shaped.to(tensor.device, dtype))


def split_factors(factors: Tensor, key_heads: int, balance: float) -> tuple[Tensor, Tensor]:
    """Factors of queries `[H]` and keys `[K]`, float64, whose products are the factors of the logits.

    Args:
        factors: of the logits of each query head, `[H]`, at most 1.
        key_heads: K; 0 where keys stay.
        balance: share of the query.
    """
    factors = factors.detach().double().cpu()
    if key_heads == 0:
        return factors, factors.new_ones(0)
    grouped = factors.view(key_heads, -1)
    of_key = grouped.amax(1) ** (1 - balance)
    return (grouped / of_key[:, None]).flatten(), of_key


class QKClip:
    """Keeps the largest logit of each head at a threshold: QK-Clip (Kimi K2, arXiv 2507.20534).

    Call `step()` after each `optimizer.step()`. In the training's own forwards the largest logit S of each
    head is
    measured: scaled, over the keys that a query sees, before soft-caps and additive biases. Where S was
        above the threshold τ, the head's weights and biases of queries and keys are scaled in place so that
        its logits are τ / S of what they were: `qk_clip_` says how. Otherwise nothing is written, and
        training is the same to the bit.

    Each step waits for the device, and q·kᵀ is computed once more, for `rows` of its rows.

    In distributed data-parallel training the largest logits are compared over all processes, since the
    weights must stay equal: `step()` must then be called by all of them. Of our remedies this is the one
    that communicates. Weights that are split over processes are refused, and an optimizer that keeps
    weights of its own (float32 copies of bfloat16 ones) undoes what is written.

    It stays active until `close()`, or the end of a `with` block, and can run beside an `EntropyMonitor`.

    Args:
        model: whose attention. Nothing is left on it.
        optimizer: calls `step()` by itself after each of its steps, if given; what was clipped is in `last`.
        threshold: τ, Kimi K2's is 100.
        balance: the query's share of each factor; 1 leaves keys alone.
        rows: query rows of each sequence to look at, evenly spaced, others each step; or "all". With fewer
            the largest logit may be missed.
        owners: name patterns (`blocks.*.attn`) of modules in which every softmax counts as attention.
        layers: "all", or name patterns of the attention layers to clip.
        process_group: of the processes that train the same weights; the default one.

    Attributes:
        last: what the last `step()` clipped.

    Raises:
        ConfigurationError: if an argument is not usable.

    Examples:
        >>> with em.QKClip(model) as clip:
        ...     for batch in loader:
        ...         loss_of(model, batch).backward()
        ...         optimizer.step()
        ...         clip.step()
        ...         optimizer.zero_grad()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        threshold: float = 100.0,
        balance: float = 0.5,
        rows: SupportsIndex | Literal["all"] = "all",
        owners: Sequence[str] = (),
        layers: Literal["all"] | Sequence[str] = "all",
        process_group: Any = None,
    ) -> None:
        check_model(model)
        _check_threshold(threshold)
        _check_balance(balance)
        check_owners(model, owners)
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            raise ConfigurationError(
                f"QKClip: optimizer must be a torch.optim.Optimizer or None, got {type(optimizer).__name__}"
            )
        patterns = ["*"] if isinstance(layers, str) and layers == "all" else layers
        if isinstance(patterns, str):
            patterns = [patterns]
        check_patterns("layers", patterns, model)
        self.last: list[ClippedHead] = []
        self._threshold = float(threshold)
        self._group = process_group
        self._patterns = tuple(patterns)
        names = {parameter: clean_name(name) for name, parameter in model.named_parameters()}
        self._guard = Guard()
        self._logits = LargestLogits(check_rows(rows), names, self._wanted)
        self._balance = float(balance)
        self._steps = 0
        self._watcher = Watcher(model, self._logits, self._guard, owners=owners, training_only=True)
        self._watcher.arm()
        self._handle = None if optimizer is None else optimizer.register_step_post_hook(self._stepped)

    def step(self) -> list[ClippedHead]:
        """Clip what overflowed since the last step.

        Returns:
            The heads that were scaled, in order of execution.

        Raises:
            ConfigurationError: in the first step, if no attention was seen, or scaling the weights of a
                layer would not scale its logits: QK-norm, parametrized, sharded or unknown projections.
                Nothing is written then.
        """
        first = self._steps == 0
        if first:
            self._agree(self._trouble())
        self._steps += 1
        units = self._logits.units()
        values = self._measured(units)
        self._logits.begin(self._steps)
        self.last = []
        for unit, maxima in zip(units, values, strict=True):
            self.last += self._clip(unit, maxima)
        return list(self.last)

    def close(self) -> None:
        """Stop watching. Safe to call twice."""
        self._watcher.disarm()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def __enter__(self) -> QKClip:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG002
        self.step()

    def _wanted(self, layer: str) -> bool:
        return any(fnmatchcase(layer, pattern) for pattern in self._patterns)

    def _clip(self, unit: Unit, maxima: list[float]) -> list[ClippedHead]:
        over = [h for h, s in enumerate(maxima) if self._threshold < s < math.inf]
        if not over:
            return []
        factors = torch.ones(len(maxima), dtype=torch.float64)
        for head in over:
            factors[head] = self._threshold / maxima[head]
        key: HeadWeights | None = unit.key
        of_query, of_key = split_factors(factors, 0 if key is None else key.heads, self._balance)
        unit.query.scale_(of_query)
        if key is not None and bool((of_key < 1).any()):
            key.scale_(of_key)
        return [ClippedHead(unit.layer, h, maxima[h], float(factors[h])) for h in over]

    def _measured(self, units: list[Unit]) -> list[list[float]]:
        """The largest logits of each unit's heads, over all processes."""
        if not units:
            return []
        device = units[0].query.weight.device
        flat = torch.cat([unit.maxima.to(device) for unit in units])
        if self._is_distributed:
            flat = flat.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
            distributed.all_reduce(flat, distributed.ReduceOp.MAX, group=self._group)
        return [part.tolist() for part in torch.split(flat, [unit.query.heads for unit in units])]

    @property
    def _is_distributed(self) -> bool:
        if not distributed.is_available() or not distributed.is_initialized():
            return False
        return distributed.get_world_size(self._group) > 1

    def _trouble(self) -> str:
        """What keeps this model from being clipped; empty where nothing does."""
        reasons = {layer: why for layer, why in self._logits.refused.items() if self._wanted(layer)}
        if reasons:
            told = "; ".join(f"{layer}: {why}" for layer, why in list(reasons.items())[:3])
            return f"QKClip: {told}. Name the other layers alone: layers=[…]"
        if self._guard.faults:
            parts = ", ".join(self._guard.faults)
            return f"QKClip: {parts} failed in the training's forward; the log says why"
        if not self._logits.units():
            sightings = self._watcher.sightings
            why = "; ".join([*sightings.rejected.values(), *sightings.skipped][:3])
            return (
                "QKClip: no softmax attention was seen in training before this step"
                + (f" ({why})" if why else "")
                + ". Make the QKClip before the forward, call step() after optimizer.step(), and name "
                "modules with hand-written attention by owners=[…]"
            )
        return ""

    def _agree(self, trouble: str) -> None:
        """Raise on every process what is wrong on one."""
        if not self._is_distributed:
            if trouble:
                raise ConfigurationError(trouble)
            return
        mine = (trouble, [(unit.layer, unit.query.heads) for unit in self._logits.units()])
        all_of_them: list[Any] = [None] * distributed.get_world_size(self._group)
        distributed.all_gather_object(all_of_them, mine, group=self._group)
        self._logits.freeze()  # what a process finds later, the others would not compare
        wrong = next((other[0] for other in all_of_them if other[0]), "")
        if wrong:
            raise ConfigurationError(wrong)
        if any(other[1] != mine[1] for other in all_of_them):
            raise ConfigurationError(
                "QKClip: processes saw different attention layers before the first step: "
                + "; ".join(str([layer for layer, _ in other[1]]) for other in all_of_them[:2])
            )


def _check_threshold(threshold: object) -> None:
    fits = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
    if not fits or not 0 < float(threshold) < math.inf:  # type: ignore[arg-type]
        raise ConfigurationError(
            f"QKClip: threshold must be a positive number, such as 100, got {threshold!r}"
        )


def _check_balance(balance: object) -> None:
    fits = isinstance(balance, (int, float)) and not isinstance(balance, bool)
    if not fits or not 0 <= float(balance) <= 1:  # type: ignore[arg-type]
        raise ConfigurationError(
            f"QK-clip: balance is the queries' share of a factor, a number from 0 to 1, got {balance!r}"
        )
