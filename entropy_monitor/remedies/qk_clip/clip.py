"""QK-clip: where a head's logits grew too large, its weights of queries and keys are scaled down."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, SupportsIndex

import torch
from torch import distributed, nn
from torch.optim import Optimizer

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.guard import Guard
from entropy_monitor.hooks import Watcher
from entropy_monitor.hooks.names import clean_name
from entropy_monitor.looking import check_model, check_owners, check_rows
from entropy_monitor.remedies.qk_clip.attention_choice import AttentionChoice
from entropy_monitor.remedies.qk_clip.head_weights import PARAMETRIZED, HeadWeights, is_parametrized
from entropy_monitor.remedies.qk_clip.largest_logits import LargestLogits, Unit
from entropy_monitor.remedies.qk_clip.scaling import check_balance, qk_clip_, split_factors
from entropy_monitor.remedies.selection import Layers

__all__ = ["ClippedHead", "QKClip", "qk_clip_"]

logger = logging.getLogger("entropy_monitor")


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


class QKClip:
    """Keeps the largest logit of each head at a threshold: QK-Clip (Kimi K2, arXiv 2507.20534).

    Call `step()` after each `optimizer.step()`. In the training's own forwards the largest logit S of each
    head is measured: scaled, over the keys that a query sees, before soft-caps and additive biases. Where S
    was above the threshold τ, the head's weights and biases of queries and keys are scaled in place so that
    its logits are τ / S of what they were: `qk_clip_` says how. Otherwise nothing is written, and training is
    the same to the bit.

    Keys are left alone, and the queries take all of τ / S, where their weights are frozen (`requires_grad` is
    False) or make values or the keys of other layers too. Layers with frozen weights of queries are left
    alone; each is logged once.

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
        layers: the attention layers to clip: "all", or "attention", which is the same here; a name pattern or
            a list of them, of attention layers or of linear layers within them; or a function of the name
            and module of an attention layer.
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
        layers: Layers = "all",
        process_group: Any = None,
    ) -> None:
        check_model(model)
        _check_threshold(threshold)
        check_balance(balance)
        check_owners(model, owners)
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            raise ConfigurationError(
                f"QKClip: optimizer must be a torch.optim.Optimizer or None, got {type(optimizer).__name__}"
            )
        self._choice = AttentionChoice(model, layers, "QKClip")
        self.last: list[ClippedHead] = []
        self._threshold = float(threshold)
        self._group = process_group
        self._model = model
        self._names = _names(model)
        self._told: set[str] = set()  # layers of which the log says that they are left alone
        self._guard = Guard()
        self._logits = LargestLogits(check_rows(rows), self._names, self._choice)
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
                layer would not scale its logits, or more than them: QK-norm, parametrized, sharded or unknown
                projections, queries whose weights make values or other queries too. In later ones, if weights
                were parametrized or replaced. Nothing is written then. A layer that runs for the first time
                later is left alone in such a case, which is logged once.
        """
        units = self._logits.units()
        if self._steps == 0:
            self._agree(self._trouble(units))
        self._require_unchanged(units)
        self._steps += 1
        for layer, why in list(self._logits.refused.items()):
            self._leave(layer, why)
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

    def _leave(self, layer: str, why: str) -> None:
        if layer not in self._told:
            self._told.add(layer)
            logger.warning("entropy-monitor: QKClip leaves %s alone: %s", layer, why)

    def _require_unchanged(self, units: list[Unit]) -> None:
        """Raise where what was a weight is none any more, so that scaling it does nothing or harm."""
        names = _names(self._model)
        for unit in units:
            heads = (unit.query,) if unit.key is None else (unit.query, unit.key)
            for parameter in (p for h in heads for p in h.parameters):
                was, name = self._names[parameter], names.get(parameter)
                if name == was:
                    continue
                why = f"its parameter {was} is {name or 'no parameter of the model'} now; make a new QKClip"
                if name is not None and is_parametrized(name):
                    why = PARAMETRIZED
                raise ConfigurationError(f"QKClip: {unit.layer}: {why}")

    def _clip(self, unit: Unit, maxima: list[float]) -> list[ClippedHead]:
        over = [h for h, s in enumerate(maxima) if self._threshold < s < math.inf]
        if unit.query.is_frozen:
            self._leave(unit.layer, "the weights of its queries are frozen (requires_grad is False)")
            return []
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

    def _trouble(self, units: list[Unit]) -> str:
        """What keeps this model from being clipped; empty where nothing does."""
        reasons = self._logits.refused
        if reasons:
            told = "; ".join(f"{layer}: {why}" for layer, why in list(reasons.items())[:3])
            return f"QKClip: {told}. Name the other layers alone: layers=[…]"
        if self._guard.faults:
            parts = ", ".join(self._guard.faults)
            return f"QKClip: {parts} failed in the training's forward; the log says why"
        asked = self._choice.asked
        if asked and not any(asked.values()):
            return (
                f"QKClip: {self._choice} names none of the attention layers that ran: "
                f"{', '.join(list(asked)[:8])}"
            )
        if not units:
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


def _names(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: clean_name(name) for name, parameter in model.named_parameters()}


def _check_threshold(threshold: object) -> None:
    fits = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
    if not fits or not 0 < float(threshold) < math.inf:  # type: ignore[arg-type]
        raise ConfigurationError(
            f"QKClip: threshold must be a positive number, such as 100, got {threshold!r}"
        )
