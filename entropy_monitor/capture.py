"""Looking at a model's attention once: `measure` for one forward, `capture` around any code."""

from __future__ import annotations

import operator
import random
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from entropy_monitor.errors import AttentionNotFoundError, ConfigurationError
from entropy_monitor.guard import Guard
from entropy_monitor.hooks import Recorder, Sightings, Watcher, is_compiled, module_names
from entropy_monitor.hooks.maps import MapChoice, WantedMaps, check_patterns
from entropy_monitor.recording import head_columns, to_host
from entropy_monitor.records import HEADS

if TYPE_CHECKING:
    import pandas as pd

RowCount = SupportsIndex | Literal["all"]


class Capture:
    """What was seen inside a `capture` block.

    Attributes:
        faults: how often each part of the reading failed, `{"reading <layer>": n}`; the log says why. Empty
            where all went well.
        maps: `maps[layer][call]` is `[B, H, Tq, Tk]`, float32: the attention of the latest forward, before
            dropout, of the layers and heads that were asked for.
    """

    def __init__(self, recorder: Recorder, wanted: WantedMaps, guard: Guard, sightings: Sightings) -> None:
        self._recorder = recorder
        self._wanted = wanted
        self._guard = guard
        self._sightings = sightings

    @property
    def heads(self) -> pd.DataFrame:
        """A row per attention call and head, layers in order of execution; the columns are those of `HEADS`.

        Several forwards inside the block are averaged, weighted by rows. Empty before the first.
        """
        import pandas as pd

        if self._recorder.is_empty:
            return pd.DataFrame(HEADS.empty())
        harvest = self._recorder.harvest()
        return pd.DataFrame(head_columns(harvest, to_host(harvest.figures)))

    @property
    def faults(self) -> dict[str, int]:
        """See the class."""
        return dict(self._guard.faults)

    @property
    def maps(self) -> dict[str, list[Tensor]]:
        """See the class.

        Raises:
            ConfigurationError: if a head was asked for that a layer does not have.
        """
        self._wanted.check()
        return self._recorder.full_maps


@contextmanager
def capture(
    model: nn.Module,
    *,
    rows: RowCount = "all",
    maps: MapChoice = False,
    owners: Sequence[str] = (),
) -> Iterator[Capture]:
    """Measure the attention of whatever forwards of `model` run inside the block.

    Training, evaluation, generation: every forward counts, and none is changed, but for one thing: torch's
    native fast path of `nn.TransformerEncoder` in eval mode without gradients is not taken meanwhile, so that
    such a forward differs from an unwatched one by rounding, and in rows that are padding.

    A layer that cannot be read never disturbs the forward: it is logged, counted in `Capture.faults`, and
    left out.

    Args:
        model: any module that contains attention.
        rows: query rows to read of each sequence, evenly spaced; or "all".
        maps: keep attention maps: True for all, name patterns of layers, or a dict from pattern to the heads
            to keep (a list, or "all").
        owners: name patterns (`blocks.*.attn`) of modules in which any softmax counts as attention.

    Yields:
        A `Capture`, filled as forwards run.

    Raises:
        ConfigurationError: if `rows`, `maps` or `owners` is not usable; at the end of the block, if `maps`
            asked for a head that a layer does not have.
    """
    check_model(model)
    count = check_rows(rows)
    check_owners(model, owners)
    guard = Guard()
    wanted = WantedMaps(maps, model)
    recorder = Recorder(count, want_map=lambda layer: wanted.of(layer, recorder.layers[layer].heads))
    watcher = Watcher(model, recorder, guard, owners=owners)
    watcher.arm()
    try:
        yield Capture(recorder, wanted, guard, watcher.sightings)
    finally:
        watcher.disarm()
    wanted.check()


def measure(
    model: nn.Module,
    *args: Any,
    rows: RowCount = "all",
    owners: Sequence[str] = (),
    **kwargs: Any,
) -> pd.DataFrame:
    """Run one forward without gradients, in the model's present mode, and measure its attention.

    Buffers (batch norm's statistics), the modules' own attributes and the random state are put back
    afterwards. A layer that cannot be read is logged and left out.

    Args:
        model: any module that contains attention.
        *args: the model's inputs.
        rows: query rows to read of each sequence, evenly spaced; or "all".
        owners: name patterns of modules in which any softmax counts as attention.
        **kwargs: the model's keyword inputs.

    Returns:
        A row per attention call and head, layers in order of execution, with the columns of
        `entropy_monitor.records.HEADS`: entropies in nats, NaN where a figure is not known.

    Raises:
        ConfigurationError: if `rows` or `owners` is not usable.
        AttentionNotFoundError: if the forward computed no attention that can be read.
    """
    with capture(model, rows=rows, owners=owners) as seen, unchanged(model), torch.no_grad():
        model(*args, **kwargs)
    if seen._recorder.is_empty:
        text = not_found(model, seen._sightings)
        raise AttentionNotFoundError(
            f"{text}\nReading failed ({seen.faults}); the log says why." if seen.faults else text
        )
    return seen.heads


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Put back what a forward may move: buffers, modes, attributes of modules, every random state.

    An attribute gets its old value back; what was changed inside that value stays changed.
    """
    kept = [_Kept(module) for module in model.modules()]
    values = {b: b.detach().clone() for b in model.buffers() if not is_lazy(b)}
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002  the state that models draw from
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        for module in kept:
            module.put_back()
        for buffer, value in values.items():
            if not torch.equal(buffer, value):  # a graph of the user's may hold those that did not change
                with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                    buffer.copy_(value)


class _Kept:
    """A module's attributes, mode and buffers (which tensors, not their values)."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._training = module.training
        self._buffers = None if isinstance(module, torch.jit.ScriptModule) else dict(module._buffers)
        # Not of torch's own modules: wrappers (FSDP) are set up by their first forward, outside their
        # attributes too, and so are lazy modules, whose very class changes.
        fixed = isinstance(module, (torch.jit.ScriptModule, LazyModuleMixin))
        fixed = fixed or type(module).__module__.startswith("torch.")
        self._attributes = None if fixed else dict(vars(module))

    def put_back(self) -> None:
        if self._attributes is not None:
            now = vars(self._module)
            for name in now.keys() - self._attributes.keys():
                del now[name]
            now.update(self._attributes)
        if self._buffers is not None:  # in their own dict, which others may hold
            self._module._buffers.clear()
            self._module._buffers.update(self._buffers)
        if self._module.training != self._training:
            self._module.training = self._training


def not_found(model: nn.Module, sightings: Sightings) -> str:
    """Why no attention was found, and how to name it by hand."""
    kind = type(model).__name__
    compiled = [name for module, name in module_names(model).items() if is_compiled(module)]
    if compiled:
        reason = (
            f"{', '.join(compiled[:5])} is compiled, and attention inside torch.compile cannot be read; "
            "give the original module"
        )
    elif sightings.forwards == 0:
        reason = (
            "no forward of this model ran (if torch.compile made another module of it: that one's attention "
            "cannot be read)"
        )
    elif sightings.skipped and sum(sightings.skipped.values()) == sightings.forwards:
        parts = ", ".join(f"{count} {why}" for why, count in sightings.skipped.items())
        reason = f"its forwards were left out: {parts} (training forwards have gradients and train mode)"
    else:
        reason = (
            "looked for F.scaled_dot_product_attention, nn.MultiheadAttention and its functional form, and "
            "softmax over a product of two activations (matmul, bmm, baddbmm, einsum)"
        )
    text = f"No attention was found in {kind}: {reason}."
    for layer, why in list(sightings.rejected.items())[:5]:
        text += f"\n  {layer}: {why}"
    return text + (
        "\nIf one of its modules computes attention in another way, name it: owners=['blocks.*.attn'] makes "
        "every softmax inside the modules of that name count."
    )


def check_model(model: object) -> None:
    """Raise unless this is a module whose attention can be seen: TorchScript shows no functions."""
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    scripted = [name for module, name in module_names(model).items() if _hides_attention(module)]
    if scripted:
        raise ConfigurationError(
            f"{', '.join(scripted[:5])}: attention inside TorchScript (torch.jit.script, torch.jit.trace) "
            "cannot be read; give the model with its original modules"
        )


def check_rows(rows: object) -> int | Literal["all"]:
    """`rows` as a plain integer or "all"; raises if it is neither, or not positive."""
    if isinstance(rows, str) and rows == "all":
        return "all"
    if isinstance(rows, SupportsIndex) and not isinstance(rows, bool):
        try:
            count = operator.index(rows)
        except TypeError:  # an array has an index only if it is one integer
            count = 0
        if count >= 1:
            return count
    raise ConfigurationError(f"rows must be a positive integer or 'all', got {rows!r}")


def check_owners(model: nn.Module, owners: object) -> None:
    """Raise unless `owners` is a list of patterns, each of which names a module of the model."""
    if isinstance(owners, str):
        raise ConfigurationError(f"owners must be a list of name patterns, got the text {owners!r}")
    if not isinstance(owners, Collection) or not all(isinstance(p, str) for p in owners):
        raise ConfigurationError(f"owners must be a list of name patterns, got {owners!r}")
    check_patterns("owners", owners, model)


def _hides_attention(module: nn.Module) -> bool:
    """Whether a module is TorchScript in which attention may run: scripted MLPs do no harm."""
    if not isinstance(module, torch.jit.ScriptModule):
        return False
    graph = str(getattr(module, "inlined_graph", ""))  # one without a forward has none
    return any(f"aten::{name}(" in graph for name in _SCRIPT_ATTENTION)


_SCRIPT_ATTENTION = (
    "softmax",
    "_softmax",
    "scaled_dot_product_attention",
    "_native_multi_head_attention",
    "_transformer_encoder_layer_fwd",
)
