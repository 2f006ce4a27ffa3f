"""What the demonstration shows: progress, alerts as they open, and where to look afterwards."""

from __future__ import annotations

import os
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from entropy_monitor.demo.digits import Digits, load_digits
from entropy_monitor.demo.training import RECIPES, Outcome, Recipe, train
from entropy_monitor.errors import MissingExtraError
from entropy_monitor.records import Alert, Sink

_WIDTH = 100
_CURE_SHOWS = 250  # steps: it learns later than the others, and then more
_LINE_EVERY = 100  # steps between lines of progress where nobody watches a terminal


def show_demo(out: Path, *, steps: int = 500, seed: int = 0) -> list[Outcome]:
    """Train every recipe, watched, and write run directories, TensorBoard and W&B files and a report.

    Args:
        out: a folder for all of it; one that exists is left alone and a numbered one is made beside it.
        steps: updates of each run.
        seed: of all runs.
    """
    _require_extras()
    digits = load_digits()
    folder = _fresh(out)
    started = time.monotonic()
    outcomes = [_run(recipe, digits, folder, steps, seed) for recipe in RECIPES]
    report = _write_report(folder, outcomes)
    _say_where(folder, report, RECIPES, outcomes, time.monotonic() - started, steps)
    return outcomes


def _run(recipe: Recipe, digits: Digits, folder: Path, steps: int, seed: int) -> Outcome:
    print(f"\n{recipe.name}: {recipe.words}, {steps} steps", flush=True)
    run_dir = folder / recipe.name
    advised: set[str] = set()
    interactive = sys.stderr.isatty()
    with _progress(steps, shown=interactive) as bar:

        def on_alert(alert: Alert) -> None:
            bar.clear()
            print(_wrapped(alert, advise=alert.kind not in advised), flush=True)
            advised.add(alert.kind)
            bar.refresh()

        def on_step(step: int, loss: float) -> None:
            bar.update()
            if interactive and step % 10 == 0:
                bar.set_postfix_str(f"loss {loss:.2f}", refresh=False)
            if not interactive and (step + 1) % _LINE_EVERY == 0:
                print(f"  step {step + 1} of {steps}, loss {loss:.2f}", flush=True)

        outcome = train(
            recipe,
            digits,
            run_dir,
            steps=steps,
            seed=seed,
            loggers=_loggers(run_dir, recipe),
            on_alert=on_alert,
            on_step=on_step,
        )
    if not outcome.alerts:
        print("  no alert")
    print(f"  loss {outcome.loss:.2f}, test accuracy {outcome.accuracy:.0%}")
    return outcome


def _loggers(run_dir: Path, recipe: Recipe) -> list[Sink]:
    from entropy_monitor.dashboards import TensorBoardLogger, WandbLogger

    return [
        TensorBoardLogger(run_dir / "tensorboard"),
        WandbLogger(mode="offline", dir=run_dir / "wandb", name=recipe.name),
    ]


def _write_report(folder: Path, outcomes: Sequence[Outcome]) -> Path:
    from entropy_monitor.dashboards.report import write_report
    from entropy_monitor.run import load_run

    return write_report([load_run(outcome.run_dir) for outcome in outcomes], folder / "report.html")


def _say_where(
    folder: Path,
    report: Path,
    recipes: Sequence[Recipe],
    outcomes: Sequence[Outcome],
    seconds: float,
    steps: int,
) -> None:
    print(f"\nDone in {seconds:.0f} s.")
    for recipe, outcome in zip(recipes, outcomes, strict=True):
        verdict = f"{len(outcome.alerts)} alerts" if outcome.alerts else "no alert"
        print(f"  {recipe.name:9} {outcome.accuracy:4.0%} correct, {verdict}: {recipe.words}")
    if steps < _CURE_SHOWS:
        print(f"The cured run starts slowly: its effect shows from about {_CURE_SHOWS} steps on.")
    worst = max(outcomes, key=lambda outcome: len(outcome.alerts))
    print(
        f"""
Where to look:
  report       {report}
               open it in a browser: the runs compared, every alert with its evidence
  TensorBoard  tensorboard --logdir {folder}
               then http://localhost:6006, tabs Scalars, Custom Scalars, Images, Text
  W&B          wandb sync {folder}/*/wandb/wandb/offline-run-*
               uploads the offline runs, if you have an account
  Python       entropy_monitor.load_run("{worst.run_dir}").plot_overview()"""
    )


def _wrapped(alert: Alert, advise: bool) -> str:
    """An alert for the terminal, in lines that can be read; the advice where it was not given before."""
    title, message, advice = str(alert).splitlines()
    lines = [f"  {title}"]
    for paragraph in (message, advice) if advise else (message,):
        lines += textwrap.wrap(paragraph.strip(), _WIDTH, initial_indent="    ", subsequent_indent="    ")
    return "\n".join([*lines, ""])


def _progress(steps: int, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=steps, desc="  training", unit="step", leave=False, ncols=80, disable=not shown)


def _fresh(out: Path) -> Path:
    """`out`, or the first of `out-2`, `out-3`, … that does not exist."""
    folder, n = out, 1
    while folder.exists():
        n += 1
        folder = out.with_name(f"{out.name}-{n}")
    folder.mkdir(parents=True)
    return folder


def _require_extras() -> None:
    from importlib import util

    for module, package in (
        ("sklearn", "scikit-learn"),
        ("tqdm", "tqdm"),
        ("tensorboard", "tensorboard"),
        ("wandb", "wandb"),
        ("matplotlib", "matplotlib"),
        ("jinja2", "jinja2"),
    ):
        if util.find_spec(module) is None:
            raise MissingExtraError(package, "demo", "the demo")
    os.environ.setdefault("WANDB_SILENT", "true")
