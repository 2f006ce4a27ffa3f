"""What watching costs and how exact it is: this package against what is done today.

    python benchmarks/cost.py [--shapes S1 S2 …] [--rounds N] [--compile] [--dtype bf16] [--device cuda]

Prints Markdown tables. Times are those of whole training steps relative to the plain one of the same round,
medians over rounds with the 10th and 90th percentile; all contenders take turns in one process, in an order
that rotates, and `plain again` is the noise of the machine. After its first eight measurements ours reads one
of four in full, with weights, gradients and updates; it is shown apart. A contender's default run is one
measured step, in this mixture, and nine between. Extra memory is that of a process of its own, over that of
the plain training. Errors are those of a head's mean entropy against float64, from the q and k of the
training's own forward, in eager mode:
of the model as it is initialised, and of one trained at a far too high rate until half its heads collapsed.
`rows="auto"` is taken as it starts, before it has seen what a step costs.

`pip install --no-deps torch-module-monitor h5py` adds the one package on PyPI that was found to log attention
entropy in training. Others were looked at and are left out: attnspectra and bertviz analyse maps that the
model has returned, and so cost what the extra forward costs; eole logs entropies of its own models only; the
probe of Meta Lingua (xformers) is not on PyPI; Composer's ActivationMonitor, torchlens and wandb.watch have
no attention entropy.
"""

from __future__ import annotations

import argparse
import gc
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from statistics import median

import torch
from cost_contenders import AGAIN, BASE, CONTENDERS, IN_FULL, PEER, PEER_MISSING, Plain, Setting, why
from cost_error import collapsed, effects, errors
from cost_memory import peaks
from models import CLOCKS, SHAPES, Clock, Shape, machine, spread, timed

EVERY = 10  # of the default run: one measured step, the others between

_NOTHING = "–", "–"

Cells = dict[str, str]


def times(setting: Setting, rounds: int, clock: Clock) -> dict[str, Cells]:
    """Ratios to the plain step of the same round, as text; of a contender that fails, why."""
    cells: dict[str, Cells] = {}
    contenders: dict[str, Plain] = {}
    for name, make in CONTENDERS.items():
        try:
            contenders[name] = make(setting)
            for _ in range(max(3 if setting.compiled else 1, contenders[name].beginning)):
                contenders[name].measured()
                contenders[name].between()
        except Exception as error:  # noqa: BLE001  a contender may fail in any way
            contenders.pop(name, None)
            cells[name] = {"measured": why(error)}
    names = list(contenders)
    ratios: dict[str, dict[str, list[float]]] = {
        name: {kind: [] for kind in ("measured", "in full", "between")} for name in names
    }
    for i in range(rounds):
        at = i % len(names)
        seconds, in_full = {}, {}
        for name in names[at:] + names[:at]:
            gc.collect()
            in_full[name] = contenders[name].in_full
            steps = (partial(_step, contenders[name], kind) for kind in (True, False))
            seconds[name] = [timed(step, clock) for step in steps]
        plain = sum(seconds[BASE]) / 2
        for name, (measured, between) in seconds.items():
            ratios[name]["in full" if in_full[name] else "measured"].append(measured / plain)
            ratios[name]["between"].append(between / plain)
    for name in names:
        cells[name] = {kind: spread(values) for kind, values in ratios[name].items() if values}
        cells[name]["default"] = _default_run(ratios[name])
        contenders[name].close()
    return cells


def _default_run(ratios: dict[str, list[float]]) -> str:
    """One measured step and nine between, as text."""
    measured, between = median(ratios["measured"]), median(ratios["between"])
    if ratios["in full"]:
        measured = (median(ratios["in full"]) + (IN_FULL - 1) * measured) / IN_FULL
    return f"{(measured + (EVERY - 1) * between) / EVERY:.3f}"


def _step(contender: Plain, measured: bool) -> None:
    contender.measured() if measured else contender.between()
    if contender.setting.device == "cuda":
        torch.cuda.synchronize()


def memory(setting: Setting, threads: int) -> Cells:
    """Peak memory over the plain training's, in MB, as text."""
    found = peaks(setting, threads)
    base = found[BASE]
    return {
        name: f"{value - base:.0f}" if isinstance(value, float) and isinstance(base, float) else "–"
        for name, value in found.items()
    }


def exactness(setting: Setting, steps: int) -> dict[str, tuple[str, int]]:
    """Largest and root mean square error over heads and steps, in nats, as text; and the rows read."""
    found = {}
    for name in CONTENDERS:
        if name in (BASE, AGAIN):
            continue
        try:
            off, rows = errors(name, setting, steps)
        except Exception:  # noqa: BLE001  the table of times says why
            continue
        found[name] = f"{off.abs().max():.1e} / {off.square().mean().sqrt():.1e}", rows
    return found


def show(setting: Setting, label: str, options: argparse.Namespace) -> None:
    """The tables of a shape."""
    print(f"\n## {label}: {_words(setting)}\n", flush=True)
    cells = times(setting, options.rounds, CLOCKS[options.clock])
    extra = memory(setting, options.threads)
    _head(
        "contender",
        "measured step",
        "one in four, in full",
        "step between",
        f"default run (1 in {EVERY})",
        "extra memory, MB",
    )
    for name in CONTENDERS:
        kinds = [cells[name].get(kind, "–") for kind in ("measured", "in full", "between", "default")]
        _row([name, *kinds, extra[name]])
    fresh = exactness(setting, options.error_steps)
    weights, remark = collapsed(setting, options.training_steps)
    sharp = exactness(replace(setting, weights=weights), options.error_steps)
    print("\nErrors in nats, max / rms:\n")
    _head("contender", "rows of a sequence", "as initialised", "after collapse")
    for name in CONTENDERS:
        if name not in (BASE, AGAIN):
            (soft, rows), (hard, _) = fresh.get(name, _NOTHING), sharp.get(name, _NOTHING)
            _row([name, str(rows), soft, hard])
    print(f"\nThe collapsed model: {remark}.", flush=True)


def show_effects(device: str) -> None:
    """What is wrong with each contender beside its cost."""
    print("\n## What else\n")
    _head("contender", "as measured on a small model", "and")
    for name, contender in CONTENDERS.items():
        if name in (BASE, AGAIN):
            continue
        try:
            found = str(effects(name, device))
        except Exception as error:  # noqa: BLE001
            found = why(error)
        _row([name, found, contender.remark or "–"])


def _head(*columns: str) -> None:
    _row(columns)
    _row(["---"] * len(columns))


def _row(cells: Sequence[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def _words(setting: Setting) -> str:
    s = setting.shape
    mode = "compiled" if setting.compiled else "eager"
    return (
        f"{s.layers} layers, width {s.width}, {s.heads} heads, {s.tokens} tokens, batch {s.batch}; {mode}, "
        f"{'bf16 autocast' if setting.bf16 else 'float32'}"
    )


def _shape(text: str) -> tuple[str, Shape]:
    if text in SHAPES:
        return text, SHAPES[text]
    try:
        layers, width, heads, tokens, batch = (int(n) for n in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shape: give {', '.join(SHAPES)} or LAYERS,WIDTH,HEADS,TOKENS,BATCH"
        ) from None
    return text, Shape(layers, width, heads, tokens, batch)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [_shape(name) for name in ("S1", "S2")]
    parser.add_argument("--shapes", nargs="+", type=_shape, default=known, metavar="SHAPE")
    parser.add_argument("--rounds", type=int, default=16, help="four of them hold one that is read in full")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: for a busy machine")
    parser.add_argument("--compile", action="store_true", help="train through torch.compile")
    parser.add_argument("--dtype", choices=["float32", "bf16"], default="float32", help="bf16: autocast")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--error-steps", type=int, default=4, help="batches over which errors are taken")
    parser.add_argument("--training-steps", type=int, default=100, help="most steps of the collapsing model")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, to see that it runs")
    options = parser.parse_args()
    if options.smoke:
        options.shapes, options.rounds = [_shape("smoke")], 4
        options.error_steps, options.training_steps = 2, 10
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    print(
        f"{machine(options.device)}. A plain training step = 1, medians of {options.rounds} rounds, "
        f"{options.clock} time."
    )
    if find_spec("torch_module_monitor") is None:
        print(f"{PEER} is {PEER_MISSING}.")
    for label, shape in options.shapes:
        setting = Setting(
            shape, device=options.device, bf16=options.dtype == "bf16", compiled=options.compile
        )
        show(setting, label, options)
    show_effects(options.device)


if __name__ == "__main__":
    main()
