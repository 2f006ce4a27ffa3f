"""Runs a captured graph on fake tensors, under the eyes of an observer."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from entropy_monitor.hooks import sharding, transforms
from entropy_monitor.hooks.compiled.graph import GraphObserver, Traced
from entropy_monitor.hooks.scope import is_leaf
from entropy_monitor.hooks.sources import ATTENTION


class GraphRun(fx.Interpreter):
    """Runs a graph on fake tensors, showing its functions to an observer.

    Args:
        traced: where to note what was found.
        observer: sees the functions.
        root: the module whose forward the graph is, if it is one.
        modules: the watched modules by identity, as Dynamo notes it at every node.
        done: takes every graph that was run, those within this one too.
    """

    def __init__(
        self,
        traced: Traced,
        observer: GraphObserver,
        root: nn.Module | None,
        modules: Mapping[str, nn.Module],
        done: list[Traced],
    ) -> None:
        super().__init__(traced.module)
        self._traced = traced
        self._observer = observer
        self._root = root
        self._modules = modules
        self._done = done
        self._running: list[nn.Module] = []
        self.autocasts: list[Any] = []
        done.append(traced)

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, and show it."""
        if n.op not in ("call_function", "call_method"):
            return self._note(n, super().run_node(n))
        known = n.meta.get("example_value")
        if isinstance(known, (torch.SymInt, torch.SymFloat)) and known.node.has_hint():
            return known.node.hint  # what it was in the first call
        self._follow(n)
        if n.target is torch._C._set_grad_enabled:
            return None
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        inner = _inner_graph(n, args)
        if inner is not None:
            return self._note(n, self._run_inner(n, *inner))
        function = _function(n, args)
        if any(_holds_attention(a) for a in args if isinstance(a, fx.GraphModule)):
            self._observer.reject(f"attention within {n.target} in compiled code cannot be read")
        if transforms.is_inside_vmap():  # the operator has no rule for it
            if function in ATTENTION:
                self._observer.reject(transforms.IN_VMAP)
            return self._note(n, super().run_node(n))
        part = n.target is operator.getitem and not isinstance(args[0], Tensor)  # of a tuple
        if part or not self._observer.scopes:
            return self._note(n, super().run_node(n))
        self._observer.at = (self._traced, n)
        if function in ATTENTION:
            self._observer.guard.run(
                "following a graph", sharding.show_before, self._observer, function, args, kwargs
            )
        result = self._note(n, super().run_node(n))
        self._keep_autocast(n, result)
        for part in result if type(result) in (tuple, list) else (result,):
            if isinstance(part, Tensor):
                module = self._running[-1]
                self._observer.guard.run(
                    "following a graph",
                    sharding.show_after,
                    self._observer,
                    function,
                    args,
                    kwargs,
                    part,
                    module,
                )
        return result

    def _follow(self, node: fx.Node) -> None:
        """Have those modules running in which a node ran; one that makes no tensor may not tell."""
        stack = node.meta.get("nn_module_stack") or {}
        if not stack and not isinstance(node.meta.get("example_value"), (Tensor, tuple, list)):
            return
        identities = [key.partition("@")[0] for key in stack]
        found = [self._modules[key] for key in identities if key in self._modules]
        if self._root is not None and self._root not in found:
            found = [self._root, *found]
        self._running = found or self._running
        self._observer.sync([m for m in self._running if not is_leaf(m)])

    def _note(self, node: fx.Node, result: Any) -> Any:
        if isinstance(result, Tensor) and sharding.is_sharded(result):
            self._traced.split.add(node)
            held = sharding.local(result)
            self._traced.nodes.setdefault(id(held), node)
            self._traced.kept.append(held)
        elif isinstance(result, Tensor):
            self._traced.nodes.setdefault(id(result), node)
            self._traced.kept.append(result)  # so that its identity is not given to another
        return result

    def _run_inner(self, call: fx.Node, module: fx.GraphModule, args: tuple[Any, ...]) -> Any:
        if any(traced.module is module for traced in self._done):  # one region, run several times
            return fx.Interpreter(module).run(*args)
        traced = Traced(module, self._traced, call)
        inner = GraphRun(traced, self._observer, None, self._modules, self._done)
        inner._running, inner.autocasts = self._running, self.autocasts
        return inner.run(*args)

    def _keep_autocast(self, node: fx.Node, result: Any) -> None:
        name = getattr(node.target, "__name__", "")
        if name == "_enter_autocast":
            self.autocasts.append(result)
        elif name == "_exit_autocast" and self.autocasts:
            self.autocasts.pop()


def read_graph(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    root: nn.Module | None,
    observer: GraphObserver,
    modules: Mapping[str, nn.Module],
) -> list[Traced]:
    """Run a graph on fakes of its inputs.

    Args:
        module: as Dynamo captured it.
        inputs: of the first call, real or fake.
        root: the module whose forward it is, if it is one.
        observer: sees its functions.
        modules: the watched modules by identity.

    Returns:
        The graph and those within it, with the attention calls that each holds.
    """
    done: list[Traced] = []
    traced = Traced(module)
    run = GraphRun(traced, observer, root, modules, done)
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    # Without gradients: what would be saved for them would count among what a checkpoint around saves.
    with mode, torch.no_grad():
        try:
            run.run(*[_fake(x) for x in inputs])
        finally:
            for entered in reversed(run.autocasts):
                entered.__exit__(None, None, None)
    return done


def _fake(x: Any) -> Any:
    """A fake with the sizes of now: those of Dynamo's own fakes would leave guards behind when looked at."""
    if isinstance(x, torch.SymInt):
        return int(x.node.hint)
    if not isinstance(x, Tensor):
        return x
    if sharding.is_sharded(x):
        return sharding.with_local(x, _fake(sharding.held(x)))
    if type(x) not in (Tensor, nn.Parameter) and not _is_fake(x):
        raise TypeError(f"inputs of type {type(x).__name__}")
    size, stride = _ints(x.shape), _ints(x.stride())
    fake: Tensor = torch.empty_strided(size, stride, dtype=x.dtype, device=x.device)
    if isinstance(x, nn.Parameter):
        return nn.Parameter(fake, requires_grad=x.requires_grad)
    return fake.requires_grad_(x.requires_grad) if x.is_floating_point() else fake


def _is_fake(x: Tensor) -> bool:
    return type(x).__name__ == "FakeTensor"


def _ints(numbers: Sequence[Any]) -> list[int]:
    return [int(n.node.hint) if isinstance(n, torch.SymInt) else int(n) for n in numbers]


def _inner_graph(node: fx.Node, args: tuple[Any, ...]) -> tuple[fx.GraphModule, tuple[Any, ...]] | None:
    """The graph within a node that runs one just as it is: checkpointed or marked regions."""
    name = str(getattr(node.target, "_name", None) or getattr(node.target, "__name__", ""))
    if not args or not isinstance(args[0], fx.GraphModule):
        return None
    if name in ("tag_activation_checkpoint", "wrap_activation_checkpoint", "wrap"):
        return args[0], args[1:]
    if name == "invoke_subgraph":
        return args[0], args[2:]
    return None


def _holds_attention(module: fx.GraphModule) -> bool:
    return any(node.target in ATTENTION for node in module.graph.nodes if callable(node.target))


def _function(node: fx.Node, args: tuple[Any, ...]) -> Callable[..., Any]:
    """The function of torch that a node calls, as it would be seen in eager mode."""
    if node.op == "call_method":
        method: Callable[..., Any] = getattr(Tensor, str(node.target), None) or getattr(
            type(args[0]), str(node.target)
        )
        return method
    target: Any = node.target
    if getattr(target, "__module__", "") in ("_operator", "operator"):
        name = str(target.__name__).rstrip("_")
        target = getattr(Tensor, f"__{name}__", target)
    function: Callable[..., Any] = target
    return function
