"""Looking at a model's attention once: `measure` for one forward, `capture` around any code."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from entropy_monitor.coverage import Coverage
from entropy_monitor.describe import Description
from entropy_monitor.errors import AttentionNotFoundError, ConfigurationError
from entropy_monitor.guard import Guard
from entropy_monitor.hooks import Recorder, Watcher, module_names
from entropy_monitor.hooks.maps import MapChoice, WantedMaps, check_patterns
from entropy_monitor.recording import head_columns, to_host
from entropy_monitor.records import HEADS
from entropy_monitor.undisturbed import run_eagerly, unchanged

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

    def __init__(self, recorder: Recorder, wanted: WantedMaps, guard: Guard, coverage: Coverage) -> None:
        self._recorder = recorder
        self._wanted = wanted
        self._guard = guard
        self._coverage = coverage

    def describe(self) -> Description:
        """What was found: owners, sources, heads, masks, projections; what is not covered, and why."""
        return self._coverage.describe()

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

    def nothing_found(self) -> AttentionNotFoundError:
        """The error for a block in which nothing was read."""
        return AttentionNotFoundError(self._coverage.why_nothing())

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
    coverage = Coverage(model, recorder, watcher, guard)
    seen = Capture(recorder, wanted, guard, coverage)
    watcher.arm()
    try:
        yield seen
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
    afterwards. A layer that cannot be read is logged and left out. Where modules of the model are compiled,
    this forward runs as they were written: nothing is compiled for it. `capture` reads compiled code itself.

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
        ConfigurationError: if `rows` or `owners` is not usable, or model or inputs hold no values.
        AttentionNotFoundError: if the forward computed no attention that can be read.
    """
    check_model(model)
    check_values(model, args, kwargs)
    watched = capture(model, rows=rows, owners=owners)
    with run_eagerly(model), watched as seen, unchanged(model), torch.no_grad():
        model(*args, **kwargs)
    if seen._recorder.is_empty:
        raise seen.nothing_found()
    return seen.heads


def check_values(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise where a model or its inputs have shapes and no values."""
    named = [*model.named_parameters(), *model.named_buffers()]
    tensors = [(f"its parameter {name}", t) for name, t in named if not is_lazy(t)]
    tensors += [("an input", leaf) for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
    for what, tensor in tensors:
        if tensor.is_meta or isinstance(tensor, FakeTensor):
            kind = "on the meta device" if tensor.is_meta else "a fake tensor (FakeTensorMode)"
            raise ConfigurationError(
                f"{type(model).__name__} cannot be measured: {what} is {kind}, which has a shape and no "
                "values. Put the model and its inputs on a real device first: model.to_empty(device='cpu'), "
                "then weights"
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
