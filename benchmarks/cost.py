"""What watching costs and how exact it is: this package against what is done today.

    python benchmarks/cost.py [--shapes S1 S2 …] [--rounds N] [--compile] [--dtype bf16] [--device cuda]

Prints Markdown tables. Times are those of whole training steps in one process, relative to the plain step of
the same round and kind (measured, or between), as medians with quartiles and the number of samples; the order
of the contenders is drawn anew in each round. The row `plain` is 1 by definition, and `plain again` the noise
of the machine in each column. The models have been trained a little, and see another batch in each step.

Ours reads everything in its first measurements, and one of four in full later, with weights, gradients and
updates; these and those of rows alone are timed apart, past the first ones and, with `rows="auto"`, after the
number of rows has followed the tolerance. The default run is one measured step in ten, in this mixture, and
nine between, with a 95 % interval of the medians; a monitor with `every="auto"` measures more rarely where
that is above its budget.

Extra memory is that of a process of its own, over that of the plain training. Errors are those of a head's
mean entropy against float64, from the q and k of the training's own forward, in eager mode: of the trained
model, and of one trained at a far too high rate until half of its heads collapsed (beneath the table stands
how many did). There `rows="auto"` is taken as it starts.

`pip install --no-deps torch-module-monitor h5py` adds the one package on PyPI that was found to log attention
entropy in training. Others were looked at and are left out: attnspectra and bertviz analyse maps that the
model has returned, and so cost what the extra forward costs; eole logs entropies of its own models only; the
probe of Meta Lingua (xformers) is not on PyPI; Composer's ActivationMonitor, torchlens and wandb.watch have
no attention entropy.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec

import torch
from cost_contenders import AGAIN, BASE, CONTENDERS, PEER, PEER_MISSING, why
from cost_error import collapsed, effects, errors, trained
from cost_memory import peaks
from cost_plain import Plain, Setting
from cost_times import EVERY, Ratios, quartiles, ratios
from models import CLOCKS, SHAPES, Clock, Shape, machine
from torch import Tensor

BATCHES = 64  # that follow one another while steps are timed

_NOTHING = "–", "–"

Cells = dict[str, str]


def times(setting: Setting, rounds: int, clock: Clock) -> tuple[dict[str, Cells], list[str]]:
    """What each contender's steps take, as text, or why one fails; and remarks."""
    cells: dict[str, Cells] = {}
    contenders: dict[str, Plain] = {}
    for name, make in CONTENDERS.items():
        try:
            contenders[name] = make(setting)
            for _ in range(max(3 if setting.compiled else 1, contenders[name].beginning)):
                contenders[name].measured()
                contenders[name].between()
            contenders[name].settled = contenders[name].steps
        except Exception as error:  # noqa: BLE001  a contender may fail in any way
            contenders.pop(name, None)
            cells[name] = {"alone": why(error)}
    remarks = []
    for name, found in ratios(contenders, rounds, clock).items():
        rows, remark = contenders[name].account()
        contenders[name].close()
        cells[name] = _cells(found) | ({} if name in (BASE, AGAIN) else {"rows": rows})
        remarks += [f"{name}: {remark}."] if remark else []
    return cells, remarks


def _cells(found: Ratios) -> Cells:
    return {
        "alone": quartiles(found.alone),
        "in full": quartiles(found.in_full),
        "between": quartiles(found.between),
        "default": found.default_run(),
    }


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
    sound = replace(setting, weights=trained(setting, options.prior_steps))
    cells, remarks = times(replace(sound, batches=BATCHES), options.rounds, CLOCKS[options.clock])
    extra = memory(setting, options.threads)
    _head(
        "contender",
        "rows of a sequence",
        "measured step (ours: rows alone)",
        "one in four, in full",
        "step between",
        f"default run (1 in {EVERY})",
        "extra memory, MB",
    )
    for name in CONTENDERS:
        kinds = ("rows", "alone", "in full", "between", "default")
        _row([name, *(cells[name].get(kind, "–") for kind in kinds), extra[name]])
    for remark in remarks:
        print(f"\n{remark}")
    weights, few, remark = collapsed(setting, options.training_steps)
    show_errors(
        setting, options, {f"after {options.prior_steps} steps": sound.weights or {}, _many(few): weights}
    )
    print(f"\nIn the last column {remark}.", flush=True)


def show_errors(
    setting: Setting, options: argparse.Namespace, models: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Errors with each of these weights."""
    found = [exactness(replace(setting, weights=weights), options.error_steps) for weights in models.values()]
    heads = options.error_steps * setting.shape.layers * setting.shape.heads
    print(f"\nErrors in nats, max / rms of {heads} ({options.error_steps} batches):\n")
    _head("contender", "rows of a sequence", *models)
    for name in CONTENDERS:
        if name not in (BASE, AGAIN):
            rows = next((str(off[name][1]) for off in found if name in off), "–")
            _row([name, rows, *(off.get(name, _NOTHING)[0] for off in found)])


def _many(few: int) -> str:
    return f"{few} head{'' if few == 1 else 's'} collapsed"


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
    parser.add_argument("--rounds", type=int, default=24, help="in half of them ours reads in full")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: for a busy machine")
    parser.add_argument("--compile", action="store_true", help="train through torch.compile")
    parser.add_argument("--dtype", choices=["float32", "bf16"], default="float32", help="bf16: autocast")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--error-steps", type=int, default=4, help="batches over which errors are taken")
    parser.add_argument("--prior-steps", type=int, default=100, help="of training, before anything is timed")
    parser.add_argument("--training-steps", type=int, default=100, help="most steps of the collapsing model")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, to see that it runs")
    options = parser.parse_args()
    if options.smoke:
        options.shapes, options.rounds = [_shape("smoke")], 4
        options.error_steps, options.prior_steps, options.training_steps = 2, 5, 100
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    print(
        f"{machine(options.device)}. A plain training step = 1, {options.rounds} rounds: medians (quartiles; "
        f"samples), {options.clock} time."
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
