"""Whatever fails inside the monitor, training neither sees it nor changes."""

from __future__ import annotations

import gc
import importlib
import inspect
import logging
import pkgutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any

import pytest
import torch

import entropy_monitor
from entropy_monitor import EntropyMonitor
from entropy_monitor.records import AlertEvent, Record, Sink
from tests.training import ListSink, flat, tiny, train

STEPS, HEALTHY = 6, 2

# Called by torch, by the training loop or by a thread itself: what stands between them and everything else.
DOORS = {
    "Courier._work",
    "EntropyMonitor.step",
    "StepReport.__init__",
    "Guard._note",
    "Guard.is_off",
    "Guard.run",
    "Watcher._enter",
    "Watcher._leave",
    "Watcher._see",
    "WeightWatcher._post_step",
    "WeightWatcher._pre_step",
    "Interceptor.__init__",
    "Interceptor.__torch_function__",
    "is_inside",  # all that the latter asks
    "_choose",  # torch's door to compiled code
    "_skip",  # runs once in a process
}


def watched_training(
    run_dir: Path, after_healthy: Callable[[EntropyMonitor], None]
) -> tuple[Any, EntropyMonitor]:
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    monitor = EntropyMonitor(
        model, optimizer=optimizer, run_dir=run_dir, every=1, rows=4, loggers=[ListSink()]
    )
    steps = iter(range(STEPS))

    def after(loss: torch.Tensor) -> None:
        monitor.step(loss, scalars={"lr": 0.01})
        if (step := next(steps)) == HEALTHY - 1:
            after_healthy(monitor)
        push(model, step)

    return (train(model, optimizer, STEPS, after), flat(model)), monitor


def unwatched_training() -> Any:
    model = tiny()
    steps = iter(range(STEPS))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    return train(model, optimizer, STEPS, lambda loss: push(model, next(steps))), flat(model)


def push(model: Any, step: int) -> None:
    """Make attention collapse, so that alerts are made too."""
    if step >= HEALTHY:
        with torch.no_grad():
            for part in (model.blocks[0].q, model.blocks[0].k):
                part.weight.mul_(4)


def equal(one: Any, two: Any) -> bool:
    return bool(one[0] == two[0] and torch.equal(one[1], two[1]))


def modules() -> list[ModuleType]:
    names = [m.name for m in pkgutil.walk_packages(entropy_monitor.__path__, "entropy_monitor.")]
    rooms = ("measures", "hooks", "analyzer", "store")
    kept = [n for n in names if n.count(".") == 1 or n.split(".")[1] in rooms]
    return [importlib.import_module(n) for n in kept if not n.startswith("entropy_monitor.demo")]


def bindings() -> dict[CodeType, list[tuple[Any, str]]]:
    """Where every function of the package is bound: in modules that define or import it, and in classes."""
    found: dict[CodeType, list[tuple[Any, str]]] = {}
    for module in modules():
        holders = [
            module,
            *(c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__),
        ]
        for holder in holders:
            for name, value in list(vars(holder).items()):
                inner = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                code = getattr(inspect.unwrap(inner), "__code__", None) if callable(inner) else None
                if code is not None and "entropy_monitor" in (getattr(inner, "__module__", "") or ""):
                    found.setdefault(code, []).append((holder, name))
    return found


def called(run_dir: Path) -> dict[str, CodeType]:
    """Every function of the package that runs in measured steps, on whatever thread."""
    codes: set[CodeType] = set()

    def note(frame: FrameType, event: str, arg: object) -> None:
        codes.add(frame.f_code)

    def start(monitor: EntropyMonitor) -> None:
        codes.clear()
        sys.setprofile(note)

    threading.setprofile(note)
    try:
        _, monitor = watched_training(run_dir, start)
        sys.setprofile(None)
        time.sleep(0.05)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    monitor.close()
    known = bindings()
    return {site_name(known[code]): code for code in codes if code in known}


def site_name(bound: list[tuple[Any, str]]) -> str:
    owner = next((holder.__name__ for holder, _ in bound if inspect.isclass(holder)), None)
    return bound[0][1] if owner is None else f"{owner}.{bound[0][1]}"


@pytest.mark.slow
def test_a_fault_at_any_call_stays_inside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sites = {name: code for name, code in called(tmp_path / "probe").items() if name not in DOORS}
    assert len(sites) > 100
    assert {"Recorder.attention", "Analyzer.update", "RunWriter.log", "pack", "stratified_rows"} <= set(sites)
    expected, places = unwatched_training(), bindings()
    wrong: dict[str, str] = {}
    modes = torch._C._len_torch_function_stack()
    for i, (name, code) in enumerate(sorted(sites.items())):
        caplog.clear()
        with pytest.MonkeyPatch.context() as patch:

            def broken(*args: object, **kwargs: object) -> None:
                raise RuntimeError("broken by hand")

            def inject(monitor: EntropyMonitor, code: CodeType = code) -> None:
                for holder, attribute in places[code]:
                    is_property = isinstance(vars(holder)[attribute], property)
                    patch.setattr(holder, attribute, property(broken) if is_property else broken)

            try:
                result, monitor = watched_training(tmp_path / str(i), inject)
                monitor.state_dict()
                monitor.close(timeout=10)
            except Exception as error:  # noqa: BLE001  the escape is what is looked for
                wrong[name] = f"{type(error).__name__}: {error}"
                continue
            finally:
                # Where leaving itself was broken, nothing can leave: other tests must not inherit it.
                while torch._C._len_torch_function_stack() > modes:
                    torch._C._pop_torch_function_stack()
        lines = [r for r in caplog.records if r.name == "entropy_monitor"]
        if not equal(result, expected):
            wrong[name] = "training has changed"
        elif not monitor.faults or len(lines) != len(monitor.faults):
            wrong[name] = f"{len(lines)} lines for faults {monitor.faults}"
    assert wrong == {}


def test_a_fault_at_a_door_would_be_seen(tmp_path: Path) -> None:
    """The check above can fail: without the guard the same fault escapes."""

    def unguarded(self: object, part: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("broken by hand")

    with pytest.MonkeyPatch.context() as patch:

        def inject(monitor: EntropyMonitor) -> None:
            patch.setattr("entropy_monitor.guard.Guard.run", unguarded)
            patch.setattr("entropy_monitor.hooks.recorder.Recorder.attention", broken)

        with pytest.raises(RuntimeError, match="broken by hand"):
            watched_training(tmp_path / "run", inject)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    from torch.nn.modules import module

    yield
    gc.collect()
    for hooks in (module._global_forward_hooks, module._global_forward_pre_hooks):
        hooks.clear()


class Failing(Sink):
    def __init__(self, method: str) -> None:
        self.method = method
        self.calls: list[str] = []

    def _call(self, method: str) -> None:
        self.calls.append(method)
        if method == self.method:
            raise OSError(28, "No space left on device")

    def log(self, record: Record) -> None:
        self._call("log")

    def alert(self, event: AlertEvent) -> None:
        self._call("alert")

    def flush(self) -> None:
        self._call("flush")

    def close(self) -> None:
        self._call("close")


@pytest.mark.parametrize("method", ["log", "alert", "flush", "close"])
def test_a_sink_that_fails(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("entropy_monitor.delivery._IDLE_SECONDS", 0.01)
    model, sink, healthy = tiny(), Failing(method), ListSink()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    monitor = EntropyMonitor(
        model, optimizer=optimizer, run_dir=tmp_path / "r", every=1, loggers=[sink, healthy]
    )

    def after(loss: torch.Tensor) -> None:
        monitor.step(loss if monitor._schedule.next < 3 else float("nan"))
        time.sleep(0.03)

    train(model, optimizer, 5, after)
    monitor.close()
    assert sink.calls.count(method) == 1
    assert sink.calls[-1] == "close"
    assert monitor.faults == {("closing Failing" if method == "close" else "Failing"): 1}
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1
    assert len(healthy.records) == 5


class Stuck(Sink):
    def __init__(self) -> None:
        self.release = threading.Event()

    def log(self, record: Record) -> None:
        self.release.wait(60)


def test_a_hung_sink_delays_neither_training_nor_the_others(tmp_path: Path) -> None:
    model, stuck, healthy = tiny(), Stuck(), ListSink()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    monitor = EntropyMonitor(
        model, optimizer=optimizer, run_dir=tmp_path / "r", every=1, loggers=[stuck, healthy]
    )
    train(model, optimizer, 20, monitor.step)  # would not end if a step waited
    monitor.close(timeout=0.2)
    assert not stuck.release.is_set()
    assert monitor.dropped == {"Stuck": 19}
    assert monitor.faults == {}
    assert len(healthy.records) == 20
    assert len(entropy_monitor.load_run(tmp_path / "r").heads) == 20 * 4
    stuck.release.set()


def test_a_disk_that_fails_costs_the_store_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    model, sink = tiny(), ListSink()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    monitor = EntropyMonitor(model, optimizer=optimizer, run_dir=tmp_path / "r", every=1, loggers=[sink])
    monkeypatch.setattr("os.write", full)
    monkeypatch.setattr("entropy_monitor.store.appending.SessionFiles.flush", full)
    train(model, optimizer, 4, monitor.step)
    monitor.close()
    assert len(sink.records) == 4
    assert monitor.faults == {"RunWriter": 1}
    assert "No space left on device" in caplog.text


@pytest.mark.parametrize(
    "junk", [{"loss": "nan"}, {"scalars": {"lr": [1]}}, {"loss": torch.ones(3)}, {"step": "x"}]
)
def test_junk_after_the_first_step_is_left_out(
    junk: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, sink = tiny(), ListSink()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    monitor = EntropyMonitor(model, optimizer=optimizer, run_dir=tmp_path / "r", every=1, loggers=[sink])
    calls: Iterator[dict[str, Any]] = iter([{"loss": 1.0}, junk, {"loss": 2.0}])
    train(model, optimizer, 3, lambda _: monitor.step(**next(calls)))
    monitor.close()
    assert [v for _, name, v in sink.scalars() if name == "loss"] == [1.0, 2.0]
    assert sum(monitor.faults.values()) == ("step" in junk)
    assert len(caplog.records) == 1
