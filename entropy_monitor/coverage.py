"""What of a model's attention is read, and what is not and why."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from entropy_monitor.describe import Description, LayerDescription, NotCovered
from entropy_monitor.guard import Guard
from entropy_monitor.hooks import (
    Recorder,
    Sightings,
    Watcher,
    attention_candidates,
    compiled_code_is_read,
    is_compiled,
    module_names,
)
from entropy_monitor.hooks.recorder import LayerParts
from entropy_monitor.hooks.structure import is_within, unseen_attention, whole_model
from entropy_monitor.plan import Plan

logger = logging.getLogger("entropy_monitor")

_UNSEEN = (
    "it is expected to attend, and no attention was seen in it. Kernels of one's own (an extension, Triton, "
    "a torch.autograd.Function around them) cannot be read; a softmax that is attention can be named: "
    "owners=[{name!r}]"
)
_NEVER_RAN = "it did not run in the forwards that were measured"
_SCRIPTED = "it is TorchScript, inside which no function can be seen"
_NOT_COMPILED = "it is compiled, and this version of torch ({version}) does not let compiled code be read"
_NO_PRODUCT = "its logits are no product of two activations"  # the words of the softmax source
_META = "its parameters are on the meta device, which has no values"
_FAILED = "reading failed; the log says why"
_ADDED = (
    "it was not in the model when the monitor was attached; its attention is not read, or under the "
    "name of a module around it. Close the monitor and attach a new one after such a change"
)


class Coverage:
    """Compares what was read with what the model holds.

    Args:
        model: that is watched.
        recorder: keeps what was read.
        watcher: saw it.
        guard: counts what failed.
    """

    def __init__(self, model: nn.Module, recorder: Recorder, watcher: Watcher, guard: Guard) -> None:
        self._model = model
        self._recorder = recorder
        self._watcher = watcher
        self._guard = guard
        self._told: set[str] = set()
        self._layers = 0
        self._added_before: set[nn.Module] = set()

    def describe(self, plan: Plan | None = None) -> Description:
        """What was found; waits for the device, where masks lie. See `snapshot`."""
        return self.snapshot(plan)()

    def snapshot(self, plan: Plan | None = None) -> Callable[[], Description]:
        """What is known now; what is returned puts it in words, on any thread, and waits for the device.

        Args:
            plan: how many rows are read and how often, of a training.
        """
        rows, every = (None, None) if plan is None else (plan.rows, plan.every)
        compiled = self._compiled(self._recorder.layers)
        read = [(n, replace(p), n in compiled) for n, p in list(self._recorder.layers.items()) if p.calls]
        missed = tuple(NotCovered(name, reason) for name, reason in self.missed().items())
        softmaxes = tuple(
            NotCovered(name, reason)
            for name, reason in self._watcher.sightings.rejected.items()
            if _NO_PRODUCT in reason and not any(item.module == name for item in missed)
        )
        candidates = () if read else tuple(attention_candidates(self._model))
        faults, kind = dict(self._guard.faults), type(self._model).__name__
        return lambda: Description(
            kind,
            tuple(_layer(*each) for each in read),
            missed,
            softmaxes,
            candidates,
            faults,
            rows,
            every,
        )

    def news(self) -> bool:
        """Look at what a measured step brought, and warn of what is not covered, once a module.

        Returns:
            Whether layers or gaps are new since the last time.
        """
        layers = len(self._recorder.layers)
        if layers == self._layers and not self._has_grown():
            return False
        grown, self._layers = layers > self._layers, layers
        missed = {name: why for name, why in self.missed().items() if name not in self._told}
        self._told |= set(missed)
        if missed:
            logger.warning(
                "entropy-monitor: attention may be missing from what is measured:%s",
                "".join(f"\n  {name}: {why}" for name, why in missed.items()),
            )
        return grown or bool(missed)

    def why_nothing(self) -> str:
        """Why no attention was read at all, and what to do."""
        return not_found(
            self._model, self._watcher.sightings, self._recorder.rejected, dict(self._guard.faults)
        )

    def missed(self) -> dict[str, str]:
        """Modules whose attention is not read, and why; without any reading only what is known anyway."""
        layers, rejected = self._recorder.layers, self._watcher.sightings.rejected
        missed = {name: _FAILED for name, parts in layers.items() if not parts.calls}
        missed |= {name: why for name, why in rejected.items() if _NO_PRODUCT not in why}
        missed |= self._recorder.rejected
        missed |= self._unreadable()
        if any(parts.calls for parts in layers.values()):
            for name in unseen_attention(self._model, [*layers, *missed]):
                missed[name] = rejected.get(name) or self._why_unseen(name)
        return missed | self._added()

    def _has_grown(self) -> bool:
        """Whether modules were added since the last time."""
        added = {module for module in self._model.modules() if module not in self._watcher.names}
        grown = not added <= self._added_before
        self._added_before = added
        return grown

    def _added(self) -> dict[str, str]:
        known = self._watcher.names
        added = {name: module for module, name in module_names(self._model).items() if module not in known}
        candidates = set(attention_candidates(self._model)) if added else set()
        outermost = [n for n in added if not any(n != other and n.startswith(f"{other}.") for other in added)]
        return {
            name: _ADDED
            for name in outermost
            if any(found == name or found.startswith(f"{name}.") for found in candidates)
        }

    def _unreadable(self) -> dict[str, str]:
        if any(p.is_meta for p in self._model.parameters()):
            return {type(self._model).__name__: _META}
        names = module_names(self._model)
        if compiled_code_is_read():
            return {}
        why = _NOT_COMPILED.format(version=torch.__version__)
        return {name: why for module, name in names.items() if is_compiled(module)}

    def _why_unseen(self, name: str) -> str:
        module = next(module for module, its in module_names(self._model).items() if its == name)
        if isinstance(module, torch.jit.ScriptModule):
            return _SCRIPTED
        if name not in self._watcher.sightings.ran and name not in self._compiled([name]):
            return _NEVER_RAN
        return _UNSEEN.format(name=name)

    def _compiled(self, layers: Iterable[str]) -> set[str]:
        """Which layers run as compiled code: seen there, or as far as the modules around them tell."""
        names = module_names(self._model)
        roots = whole_model(self._model)
        around = [name for module, name in names.items() if is_compiled(module)]
        return self._watcher.sightings.compiled | {
            layer
            for layer in layers
            if any(name in roots or name == layer or is_within(layer, name, roots) for name in around)
        }


def as_plan(description: Description) -> dict[str, Any]:
    """A description as the run directory keeps it: by layer how it is measured, or why it is not."""
    found: dict[str, Any] = {}
    for layer in description.layers:
        found[layer.layer] = {name: value for name, value in vars(layer).items() if name != "layer"}
        found[layer.layer] |= {"rows": description.rows, "every": description.every}
    for item in description.not_covered:
        found.setdefault(item.module, {})["not_covered"] = item.reason
    return found


def _layer(name: str, parts: LayerParts, compiled: bool) -> LayerDescription:
    return LayerDescription(
        name,
        parts.index,
        parts.source,
        parts.attention,
        parts.heads,
        parts.key_heads,
        parts.head_size,
        parts.calls,
        "not known" if parts.visibility is None else parts.visibility.in_words(),
        "compiled" if compiled else "eager",
        parts.reading,
        {str(role): how for role, how in parts.projections.items()},
        {str(role): why for role, why in parts.reasons.items() if role not in parts.projections},
        parts.ranks,
    )


def not_found(
    model: nn.Module, sightings: Sightings, rejected: Mapping[str, str], faults: Mapping[str, int]
) -> str:
    """Why no attention was found, and how to name it by hand.

    Args:
        model: that was watched.
        sightings: what was seen and not measured.
        rejected: layers that could not be read, and why.
        faults: how often each part of the reading failed.
    """
    kind = type(model).__name__
    compiled = [name for module, name in module_names(model).items() if is_compiled(module)]
    rejected = sightings.rejected | dict(rejected)
    if any(p.is_meta for p in model.parameters()):
        reason = _META
    elif compiled and not compiled_code_is_read():
        reason = (
            f"{', '.join(compiled[:5])} is compiled, and this version of torch ({torch.__version__}) does "
            "not let attention inside torch.compile be read; give the original module"
        )
    elif sightings.forwards == 0 and not compiled and not rejected:
        reason = (
            "no forward of this model ran. Was another object called than the one that is watched, such as a "
            "copy, or an exported or scripted version of it?"
        )
    elif sightings.skipped and sum(sightings.skipped.values()) >= sightings.forwards:
        parts = ", ".join(f"{count} {why}" for why, count in sightings.skipped.items())
        reason = f"its forwards were left out: {parts} (training forwards have gradients and train mode)"
    else:
        reason = (
            "looked for F.scaled_dot_product_attention, nn.MultiheadAttention and its functional form, "
            "FlexAttention, flash-attn, xformers, and softmax over a product of two activations (matmul, "
            "bmm, baddbmm, einsum)"
        )
    text = f"No attention was found in {kind}: {reason}."
    for layer, why in list(rejected.items())[:5]:
        text += f"\n  {layer}: {why}"
    if faults:
        text += f"\nReading failed ({dict(faults)}); the log says why."
    if sightings.forwards == 0 or faults:
        return text
    unseen = unseen_attention(model, [])[:5]
    if unseen and not rejected:
        text += (
            f"\nBy class, name or code attention is expected in {', '.join(unseen)}. Kernels of "
            "one's own (an extension, Triton, a torch.autograd.Function around them) cannot be read."
        )
    return text + (
        "\nIf one of its modules computes attention in another way, name it: owners=['blocks.*.attn'] makes "
        "every softmax inside the modules of that name count."
    )
