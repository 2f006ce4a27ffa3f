"""What the demonstration shows: progress, alerts as they open, and where to look afterwards."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entropy_monitor.demo.digits import Digits, load_digits
from entropy_monitor.demo.training import RECIPES, Outcome, Recipe, train
from entropy_monitor.errors import ConfigurationError, MissingExtraError
from entropy_monitor.records import Alert, Sink

_CURE_SHOWS = 250  # steps: it learns later than the others, and then more
_LINE_EVERY = 100  # steps between lines of progress where nobody watches a terminal
_WIDEST = 100


@dataclass(frozen=True)
class Demonstration:
    """What the demonstration left.

    Attributes:
        folder: all of it.
        report: the page about all runs.
        outcomes: how each run ended, in the order of `RECIPES`.
        seconds: it took.
    """

    folder: Path
    report: Path
    outcomes: tuple[Outcome, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        runs = [
            {
                "name": recipe.name,
                "words": recipe.words,
                "run": str(outcome.run_dir),
                "tensorboard": str(_tensorboard(outcome.run_dir)),
                "wandb": str(_wandb(outcome.run_dir)),
                "loss": outcome.loss,
                "accuracy": outcome.accuracy,
                "alerts": [alert.title for alert in outcome.alerts],
            }
            for recipe, outcome in zip(RECIPES, self.outcomes, strict=True)
        ]
        return {"folder": str(self.folder), "report": str(self.report), "seconds": self.seconds, "runs": runs}


def show_demo(out: Path, *, steps: int = 500, seed: int = 0, quiet: bool = False) -> Demonstration:
    """Train every recipe, watched, and write run directories, TensorBoard and W&B files and a report.

    Args:
        out: a folder for all of it; one that exists is left alone and a numbered one is made beside it.
        steps: updates of each run.
        seed: of all runs.
        quiet: print nothing.

    Returns:
        What it left.

    Raises:
        MissingExtraError: something that it needs is not installed.
        ConfigurationError: `out` cannot be written.
    """
    _require_extras()
    digits = load_digits()
    folder = _fresh(out)
    started = time.monotonic()
    # Whoever is quiet has no progress bar either.
    show = _Show(sys.stderr.isatty(), print) if not quiet else _Show(False, _nothing)
    outcomes = tuple(show.run(recipe, digits, folder, steps, seed) for recipe in RECIPES)
    report = _write_report(outcomes, folder / "report.html")
    done = Demonstration(folder, report, outcomes, time.monotonic() - started)
    show.say("\n".join(_where(done, steps)))
    return done


def _nothing(*words: object, flush: bool = False) -> None:
    """Prints nothing."""


@dataclass(frozen=True)
class _Show:
    """Runs recipes before an audience.

    Attributes:
        interactive: whether somebody watches a terminal.
        say: prints.
    """

    interactive: bool
    say: Callable[..., None]

    def run(self, recipe: Recipe, digits: Digits, folder: Path, steps: int, seed: int) -> Outcome:
        """Train one recipe, with progress and alerts as they open."""
        self.say("\n" + _filled(f"{recipe.name}: {recipe.words}, {steps} steps", "", 2), flush=True)
        run_dir = folder / recipe.name
        advised: set[str] = set()
        with _progress(steps, shown=self.interactive) as bar:

            def on_alert(alert: Alert) -> None:
                bar.clear()
                self.say(_wrapped(alert, advise=alert.kind not in advised), flush=True)
                advised.add(alert.kind)
                bar.refresh()

            def on_step(step: int, loss: float) -> None:
                bar.update()
                if self.interactive and step % 10 == 0:
                    bar.set_postfix_str(f"loss {loss:.2f}", refresh=False)
                if not self.interactive and (step + 1) % _LINE_EVERY == 0:
                    self.say(f"  step {step + 1} of {steps}, loss {loss:.2f}", flush=True)

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
            self.say("  no alert")
        self.say(f"  loss {outcome.loss:.2f}, test accuracy {outcome.accuracy:.0%}")
        return outcome


def _tensorboard(run_dir: Path) -> Path:
    return run_dir / "tensorboard"


def _wandb(run_dir: Path) -> Path:
    return run_dir / "wandb"


def _loggers(run_dir: Path, recipe: Recipe) -> list[Sink]:
    from entropy_monitor.dashboards import TensorBoardLogger, WandbLogger

    return [
        TensorBoardLogger(_tensorboard(run_dir)),
        WandbLogger(mode="offline", dir=_wandb(run_dir), name=recipe.name),
    ]


def _write_report(outcomes: Sequence[Outcome], path: Path) -> Path:
    from entropy_monitor.dashboards.report import write_report

    return write_report([outcome.run_dir for outcome in outcomes], path)


def _where(done: Demonstration, steps: int) -> Iterator[str]:
    """How the runs ended, and where to look at them."""
    yield f"\nDone in {done.seconds:.0f} s."
    for recipe, outcome in zip(RECIPES, done.outcomes, strict=True):
        count = len(outcome.alerts)
        verdict = f"{count} alert{'s' * (count != 1)}" if count else "no alert"
        yield _filled(f"{recipe.name:9} {outcome.accuracy:4.0%} correct, {verdict}: {recipe.words}", "  ", 12)
    if steps < _CURE_SHOWS:
        yield f"The cured run starts slowly: its effect shows from about {_CURE_SHOWS} steps on."
    worst = max(done.outcomes, key=lambda outcome: len(outcome.alerts))
    yield "\nWhere to look:"
    for place, how, what in (
        ("page", f"entropy-monitor serve {done.folder}", "the runs compared, heads, alerts with evidence"),
        ("report", str(done.report), "the same views in one file, to open in a browser or send"),
        ("terminal", f"entropy-monitor compare {done.folder}", ""),
        (
            "TensorBoard",
            f"tensorboard --logdir {done.folder}",
            "then http://localhost:6006, tabs Attention, Custom Scalars, Images, Histograms, Text",
        ),
        (
            "W&B",
            f"wandb sync {_wandb(done.folder / '*')}/wandb/offline-run-*",
            "uploads the offline runs, if you have an account",
        ),
        ("Python", f'entropy_monitor.load_run("{worst.run_dir}").plot_overview()', ""),
    ):
        yield f"  {place:12} {how}"
        if what:
            yield _filled(what, " " * 15, 15)


def _wrapped(alert: Alert, advise: bool) -> str:
    """An alert for the terminal, in lines that can be read; the advice where it was not given before."""
    title, message, advice = str(alert).splitlines()
    lines = [_filled(title, "  ", 4)]
    lines += [_filled(text.strip(), "    ", 4) for text in ((message, advice) if advise else (message,))]
    return "\n".join([*lines, ""])


def _filled(text: str, first: str, indent: int) -> str:
    """A paragraph as wide as the terminal, up to what reads well."""
    width = min(shutil.get_terminal_size((_WIDEST, 24)).columns, _WIDEST)
    return textwrap.fill(
        text, width, initial_indent=first, subsequent_indent=" " * indent, break_on_hyphens=False
    )


def _progress(steps: int, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(
        total=steps, desc="  training", unit="step", leave=False, dynamic_ncols=True, disable=not shown
    )


def _fresh(out: Path) -> Path:
    """`out`, or the first of `out-2`, `out-3`, … that does not exist."""
    folder, n = out, 1
    while folder.exists():
        n += 1
        folder = out.with_name(f"{out.name}-{n}")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigurationError(
            f"cannot make the folder {folder}: {error.strerror}; choose another one"
        ) from error
    return folder


def _require_extras() -> None:
    from importlib import util

    for module, package in (
        ("sklearn", "scikit-learn"),
        ("tqdm", "tqdm"),
        ("tensorboard", "tensorboard"),
        ("wandb", "wandb"),
        ("matplotlib", "matplotlib"),
        ("plotly", "plotly"),
        ("werkzeug", "werkzeug"),
        ("jinja2", "jinja2"),
    ):
        if util.find_spec(module) is None:
            raise MissingExtraError(package, "demo", "the demo")
    os.environ.setdefault("WANDB_SILENT", "true")
