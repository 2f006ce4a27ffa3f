"""Looking at a model's attention once: `measure` for one forward, `capture` around any code."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from entropy_monitor.errors import AttentionNotFoundError, ConfigurationError
from entropy_monitor.guard import Guard
from entropy_monitor.hooks import Recorder, Sightings, Watcher, is_compiled, module_names
from entropy_monitor.recording import head_columns, to_host
from entropy_monitor.records import HEADS

if TYPE_CHECKING:
    import pandas as pd

RowCount = int | Literal["all"]
MapChoice = bool | Sequence[str] | Mapping[str, Sequence[int]]


class Capture:
    """What was seen inside a `capture` block.

    Attributes:
        maps: `maps[layer][call]` is `[B, H, Tq, Tk]`, float32: the attention of the latest forward, before
            dropout, of the layers and heads that were asked for.
    """

    def __init__(self, recorder: Recorder, sightings: Sightings) -> None:
        self._recorder = recorder
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
    def maps(self) -> dict[str, list[Tensor]]:
        """See the class."""
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

    Args:
        model: any module that contains attention.
        rows: query rows to read of each sequence, evenly spaced; or "all".
        maps: keep attention maps: True for all, name patterns of layers, or a dict from pattern to heads.
        owners: name patterns (`blocks.*.attn`) of modules in which any softmax counts as attention.

    Yields:
        A `Capture`, filled as forwards run.

    Raises:
        ConfigurationError: if `rows`, `maps` or `owners` is not usable.
    """
    check_model(model)
    check_rows(rows)
    check_owners(model, owners)
    recorder = Recorder(rows, want_map=_map_choice(maps))
    watcher = Watcher(model, recorder, Guard(strict=True), owners=owners)
    watcher.arm()
    try:
        yield Capture(recorder, watcher.sightings)
    finally:
        watcher.disarm()


def measure(
    model: nn.Module,
    *args: Any,
    rows: RowCount = "all",
    owners: Sequence[str] = (),
    **kwargs: Any,
) -> pd.DataFrame:
    """Run one forward without gradients, in the model's present mode, and measure its attention.

    Buffers (batch norm's statistics) and the random state are put back afterwards.

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
        AttentionNotFoundError: if the forward computed no attention that can be seen.
    """
    with capture(model, rows=rows, owners=owners) as seen, unchanged(model), torch.no_grad():
        model(*args, **kwargs)
    if seen._recorder.is_empty:
        raise AttentionNotFoundError(not_found(model, seen._sightings))
    return seen.heads


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Put back the model's buffers and modes, and every random state that a forward may move."""
    modules = [(module, dict(module._buffers), module.training) for module in model.modules()]
    values = {b: b.detach().clone() for _, kept, _ in modules for b in kept.values() if b is not None}
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002  the state that models draw from
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        for module, buffers, training in modules:
            module._buffers.clear()
            module._buffers.update(buffers)
            module.training = training
        for buffer, value in values.items():
            if not torch.equal(buffer, value):  # a graph of the user's may hold those that did not change
                with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                    buffer.copy_(value)


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
    """Raise unless this is a module."""
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def check_rows(rows: object) -> None:
    """Raise unless `rows` is a positive integer or "all"."""
    positive = isinstance(rows, int) and not isinstance(rows, bool) and rows >= 1
    if rows != "all" and not positive:
        raise ConfigurationError(f"rows must be a positive integer or 'all', got {rows!r}")


def check_owners(model: nn.Module, owners: Sequence[str]) -> None:
    """Raise unless every pattern names a module of the model."""
    if isinstance(owners, str):
        raise ConfigurationError(f"owners must be a list of name patterns, got the text {owners!r}")
    names = list(module_names(model).values())
    for pattern in owners:
        if not any(fnmatchcase(name, pattern) for name in names):
            some = ", ".join(names[:8])
            raise ConfigurationError(
                f"owners: no module is named {pattern!r}; {type(model).__name__} has {some}, …"
            )


def _map_choice(maps: MapChoice) -> Any:
    """From the user's choice to a function from layer name to the heads to keep."""
    if maps is False:
        return None
    if maps is True:
        return lambda layer: "all"  # noqa: ARG005
    if isinstance(maps, Mapping):
        wanted = {pattern: list(heads) for pattern, heads in maps.items()}
        return lambda layer: next((h for p, h in wanted.items() if fnmatchcase(layer, p)), None)
    if isinstance(maps, str) or not all(isinstance(p, str) for p in maps):
        raise ConfigurationError(
            f"maps must be True, a list of layer name patterns, or a dict from pattern to heads, got {maps!r}"
        )
    patterns = list(maps)
    return lambda layer: "all" if any(fnmatchcase(layer, p) for p in patterns) else None
