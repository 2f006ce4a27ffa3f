"""`entropy-monitor compare`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from entropy_monitor.commands.base import DONE, Command, add_json, add_runs
from entropy_monitor.commands.progress import Progress
from entropy_monitor.commands.run_paths import names_of, run_paths
from entropy_monitor.commands.terminal import out, print_json, shown, table, wrapped
from entropy_monitor.errors import ConfigurationError
from entropy_monitor.phrases import number, percent, times

_MOST_WORDS = 12
"""Runs that are spoken of one by one below the table, those in trouble first."""

_HEADER = ("run", "verdict", "loss", "entropy", "lowest", "σ_QK", "logit", "alerts", "since")
_LEGEND = (
    "loss: mean of the last ten. entropy: share of its maximum, at the end, mean over heads; lowest: of any "
    "head at any step. σ_QK: largest growth of a head's spectral norm of W_K W_Qᵀ. logit: the largest. "
    "since: step at which the first alert opened."
)
_NONE = "–"


class Compare(Command):
    """Set runs side by side: verdict, loss, entropy, norms, logits, alerts."""

    name = "compare"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares what it takes."""
        add_runs(parser)
        parser.add_argument(
            "-o",
            "--out",
            type=Path,
            help="draw loss, entropy and σ_QK of all runs to this file (.png, .pdf, …)",
        )
        parser.add_argument("--force", action="store_true", help="replace the file if it exists")
        add_json(parser, "what the table shows and more, a list with an entry for each run")

    def run(self, options: argparse.Namespace) -> int:
        """Reads all runs, then shows them."""
        paths = run_paths(options.runs)
        if options.out is not None:
            _check_target(options.out, options.force)
        cards = []
        with Progress(len(paths) + (options.out is not None), quiet=options.json) as progress:
            for name, path in zip(names_of(paths), paths, strict=True):
                progress.at(name)
                cards.append(_card(name, path))
                progress.advance()
            if options.out is not None:
                progress.at("drawing")
                _draw(paths, options.out)
        if options.json:
            print_json(cards)
        else:
            _print(cards)
            if options.out is not None:
                out(f"\n{options.out}")
        return DONE


def _card(name: str, path: Path) -> dict[str, Any]:
    """What a run came to."""
    from entropy_monitor.dashboards.run_view import RunView

    view = RunView(path, name=name)
    card = dict(view.card())
    del card["version"]
    opened = [alert.opened for alert in view.alerts]
    return {"run": path, **card, "first_alert": min(opened, default=None)}


def _print(cards: Sequence[Mapping[str, Any]]) -> None:
    out(table(_HEADER, [_row(card) for card in cards]))
    out()
    out(wrapped(_LEGEND))
    from entropy_monitor.dashboards.verdict import WORST_FIRST

    spoken = sorted(
        (card for card in cards if card["verdict"] != "sound"),
        key=lambda card: WORST_FIRST.index(card["verdict"]),
    )
    for card in spoken[:_MOST_WORDS]:
        out()
        out(wrapped(f"{card['name']}: {card['problem'] or card['words']}"))
    if len(spoken) > _MOST_WORDS:
        out(f"\nand {len(spoken) - _MOST_WORDS} more that are not sound")


def _row(card: Mapping[str, Any]) -> tuple[str, ...]:
    if card["problem"]:
        return (shown(card["name"]), card["verdict"], *([_NONE] * (len(_HEADER) - 2)))

    def cell(value: Any, words: Any) -> str:
        return _NONE if value is None else str(words(value["value"] if isinstance(value, Mapping) else value))

    loss = "not finite" if card["final_loss"] is None and card["broken_loss"] is not None else None
    return (
        shown(card["name"]),
        card["verdict"],
        loss or cell(card["final_loss"], number),
        cell(card["end_share"], percent),
        cell(card["lowest_share"], percent),
        cell(card["sigma_growth"], times),
        cell(card["largest_logit"], number),
        str(sum(card["alerts"].values())),
        cell(card["first_alert"], str),
    )


def _check_target(target: Path, force: bool) -> None:
    if target.is_dir():
        raise ConfigurationError(f"{target} is a folder; name a file in it, such as {target / 'compare.png'}")
    if target.exists() and not force:
        raise ConfigurationError(f"{target} exists; choose another path, or replace it with --force")


def _draw(paths: Sequence[Path], target: Path) -> None:
    from entropy_monitor import figures
    from entropy_monitor.run import load_run

    figure = figures.compare([load_run(path) for path in paths])
    kinds = figure.canvas.get_supported_filetypes()
    if target.suffix.lstrip(".").lower() not in kinds:
        raise ConfigurationError(
            f"{target}: files of this kind cannot be drawn; end its name in one of {', '.join(sorted(kinds))}"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=200)
    except OSError as error:
        raise ConfigurationError(
            f"cannot write {target}: {error.strerror or error}; choose a path that can be written"
        ) from error
