"""Rewrites a captured graph: inserts the operator before every attention call that is found in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import fx, nn

from entropy_monitor.hooks.compiled.arguments import Arguments, Names, path_of
from entropy_monitor.hooks.compiled.graph import GraphCall, GraphObserver, Traced
from entropy_monitor.hooks.compiled.operator import READ, register
from entropy_monitor.hooks.compiled.plan import Anchor, OutOfReachError, Plan, freeze
from entropy_monitor.hooks.compiled.reach import Undo
from entropy_monitor.hooks.compiled.run import read_graph
from entropy_monitor.hooks.logits import Logits
from entropy_monitor.hooks.names import module_names
from entropy_monitor.hooks.observer import Sightings
from entropy_monitor.hooks.sources import python_functions


@dataclass
class Change:
    """What was done to a graph.

    Attributes:
        layers: whose attention is read there.
        undo: takes it back.
    """

    layers: tuple[str, ...]
    undo: Callable[[], None]


class Watched(Protocol):
    """What a graph is rewritten for."""

    names: Mapping[nn.Module, str]
    patterns: Sequence[str]
    innermost: Callable[[], nn.Module | None]

    def refuse(self, layers: Iterable[str], why: str) -> None:
        """Note why layers are not read."""

    def seen(self) -> None:
        """Note that a forward runs in compiled code."""


def rewrite(
    readers: Sequence[Watched], module: fx.GraphModule, inputs: Sequence[Any], graph: Any
) -> Change | None:
    """Insert the operator; every watcher that is armed when the graph runs takes the calls that are its own.

    The version of the code that reads is kept for whatever model runs that code, so nothing in it may depend
    on which are watched now.

    Args:
        readers: the armed ones.
        module: the graph.
        inputs: of its first call.
        graph: Dynamo's account of it.
    """
    if python_functions.is_inside():
        return None  # called by one that was read already
    frame = graph.root_tx
    around = next((m for r in readers if (m := r.innermost()) is not None), None)
    own, given = _modules_of(frame)
    names: dict[nn.Module, str] = {}
    for model in given if own is None else (own, *given):
        names.update((m, name) for m, name in module_names(model).items() if m not in names)
    for reader in readers:
        names.update(reader.names)
    root = around if own is None else own
    mine = {str(id(m)): m for m in names}
    if root is None and not _mentions(module, mine):
        return None
    for reader in readers:
        if root in reader.names or _mentions(module, {str(id(m)): m for m in reader.names}):
            reader.seen()
    sightings = Sightings()
    observer = GraphObserver(names, sightings, [p for reader in readers for p in reader.patterns])
    try:
        graphs = read_graph(module, inputs, root, observer, mine)
    except TypeError as error:  # of tensors that hold others, such as DTensors
        where = "" if root is None else names[root]
        sightings.rejected[where] = f"compiled code that is given {error}"
        graphs = []
    undo, left_out = insert(graphs, inputs, names, around, tuple(observer.order))
    for layer, why in {**sightings.rejected, **left_out}.items():
        for reader in readers:
            reader.refuse([layer], why)
    if not undo:
        return None
    layers = tuple(call.layer for traced in graphs for call in traced.calls)
    return Change(layers, partial(_take_back, undo, graphs))


def _modules_of(frame: Any) -> tuple[nn.Module | None, list[nn.Module]]:
    """The module whose forward a frame is, if it is one, and all that it is given."""
    given = {name: value for name, value in frame.f_locals.items() if isinstance(value, nn.Module)}
    first = next(iter(frame.f_code.co_varnames), "")
    own = given.get("self", given.get(first))
    if own is None and frame.f_code.co_name.startswith("torch_dynamo_resume"):  # it goes on after a break
        own = next(iter(given.values()), None)
    return own, list(given.values())


def _mentions(module: fx.GraphModule, modules: Mapping[str, nn.Module]) -> bool:
    """Whether any node ran in one of these modules."""
    return any(
        key.partition("@")[0] in modules
        for node in module.graph.nodes
        for key in (node.meta.get("nn_module_stack") or {})
    )


def _take_back(undo: Sequence[Undo], graphs: Sequence[Traced]) -> None:
    for change in reversed(undo):
        change()
    recompile(graphs)


def insert(
    graphs: Sequence[Traced],
    inputs: Sequence[Any],
    names: Mapping[nn.Module, str],
    around: nn.Module | None,
    order: tuple[tuple[str, int], ...],
) -> tuple[list[Undo], dict[str, str]]:
    """Insert the operator.

    Args:
        graphs: the captured graph first, then those within it.
        inputs: of the captured graph, real.
        names: qualified name of every watched module.
        around: the module that runs eagerly around the graph.
        order: of all layers and calls.

    Returns:
        What undoes it, to be called from the last to the first, and why calls were left out, by layer.
    """
    owners = Names(names)
    outer = [n for n in graphs[0].graph.nodes if n.op == "placeholder"] if graphs else []
    real = dict(zip(outer, inputs, strict=False))
    by_fake: dict[int, str] = {}
    for tensor in graphs[0].kept if graphs else ():
        name = owners.parameter(real.get(graphs[0].nodes[id(tensor)]))
        if name is not None:
            by_fake[id(tensor)] = name
    undo: list[Undo] = []
    left_out: dict[str, str] = {}
    where = None if around is None else names[around]
    try:
        for traced, call in [(t, c) for t in graphs for c in t.calls]:
            try:
                _insert(traced, call, by_fake, owners, where, order, undo)
            except OutOfReachError:
                left_out[call.layer] = "its queries or keys are not among the values of the compiled graph"
        if undo:
            recompile(graphs)
    except Exception:
        _take_back(undo, graphs)  # a graph that was half rewritten must not be compiled
        raise
    return undo, left_out


def recompile(graphs: Sequence[Traced]) -> None:
    """Have changed graphs run as they are now, those within others first."""
    for traced in reversed(graphs):
        traced.graph.lint()
        traced.module.recompile()


def _insert(
    traced: Traced,
    call: GraphCall,
    by_fake: Mapping[int, str],
    owners: Names,
    around: str | None,
    order: tuple[tuple[str, int], ...],
    undo: list[Undo],
) -> None:
    arguments = Arguments(traced, call, by_fake, owners, undo)
    if call.args is None:
        args, kwargs = arguments.of_node(tuple(call.node.args)), arguments.of_node(dict(call.node.kwargs))
    else:
        args, kwargs = freeze(tuple(call.args), arguments.tensor, arguments.linear), {}
    answers = tuple(_answer(arguments, question, answer) for question, answer in call.answers)
    later = []
    for role, projection in call.later.items():
        try:
            later.append((role, arguments.whole(projection)))
        except OutOfReachError:
            continue  # made after the attention, or from weights
    anchor = _anchor(arguments, call, traced, by_fake)
    names = {traced.nodes[id(t)]: by_fake[id(t)] for t in traced.kept if id(t) in by_fake}
    plan = Plan(
        call.source,
        args,
        kwargs,
        answers,
        call.heads,
        call.by_hand,
        call.layer,
        call.call,
        order,
        tuple(later),
        anchor,
        around,
        tuple((i, names[node]) for i, node in enumerate(arguments.tensors) if node in names),
        call.autocast,
        torch.is_grad_enabled(),
        call.owner.training,
        call.first_head,
        call.ranks,
        call.sharded,
    )
    graph = traced.graph
    with graph.inserting_before(call.node):
        # A part of a DTensor is there without any exchange.
        parts = {n: graph.call_method("to_local", (n,)) for n in arguments.tensors if n in traced.split}
        tensors = [parts.get(node, node) for node in arguments.tensors]
        read = graph.call_function(READ, (register(plan), tensors, list(arguments.sizes)))
    for node in (*parts.values(), read):
        node.meta.update({k: v for k, v in call.node.meta.items() if k in ("nn_module_stack", "stack_trace")})
        undo.append(partial(graph.erase_node, node))


def _answer(arguments: Arguments, question: str, answer: Any) -> tuple[str, Any]:
    """An answer with slots; a factor of the logits that is out of reach is not known."""
    try:
        return question, freeze(answer, arguments.tensor, arguments.linear)
    except OutOfReachError:
        if not isinstance(answer, Logits):
            raise
    plain = replace(answer, scale=None, inner=None)
    return question, freeze(plain, arguments.tensor, arguments.linear)


def _anchor(
    arguments: Arguments, call: GraphCall, traced: Traced, by_fake: Mapping[int, str]
) -> Anchor | None:
    """A parameter below the owner, one that the operator gets anyway if there is one."""
    path = path_of(call.layer, call.owner)
    prefix = path + "." if path else ""
    best: tuple[bool, fx.Node, str] | None = None
    for tensor in traced.kept:
        node = traced.nodes[id(tensor)]
        name = by_fake.get(id(tensor))
        if name is None or not name.startswith(prefix) or node.op != "placeholder":
            continue
        used = node in arguments.tensors
        if best is None or used > best[0]:
            best = (used, node, name)
    if best is None:
        return None
    return Anchor(arguments.slot(best[1]), best[2].removeprefix(prefix), type(call.owner).__name__)
