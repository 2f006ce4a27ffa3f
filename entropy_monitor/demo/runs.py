"""The demonstration's runs, for notebooks: opened where they are, trained where they are not."""

from __future__ import annotations

import os
from pathlib import Path

from entropy_monitor.demo.digits import load_digits
from entropy_monitor.demo.training import RECIPES, Recipe, train
from entropy_monitor.errors import ConfigurationError, RunDirectoryError
from entropy_monitor.run import Run, load_run


def demo_run(
    recipe: Recipe | str,
    folder: str | os.PathLike[str],
    *,
    steps: int = 250,
    seed: int = 0,
    depth: int = 6,
    batch_size: int = 128,
) -> Run:
    """Open the run of a recipe below a folder, or train it there first.

    A run counts as there if its directory has the recipe's name and it has reached `steps`; one that is
    shorter is left alone and a numbered one is made beside it. What else it was trained with is not checked.

    Args:
        recipe: one of `RECIPES` by its name, or any other.
        folder: where runs lie, such as the one that `entropy-monitor demo` wrote.
        steps: updates, if it is to be trained: 250 take about 20 s.
        seed: likewise, of weights and batches.
        depth: likewise, blocks of the model.
        batch_size: likewise, images of a batch.

    Raises:
        ConfigurationError: there is no recipe of that name.
    """
    chosen = _named(recipe) if isinstance(recipe, str) else recipe
    place = Path(folder) / chosen.name
    number = 1
    while place.exists():
        run = _open(place)
        if run is not None and len(run.loss) and int(run.loss.index[-1]) >= steps - 1:
            return run
        number += 1
        place = place.with_name(f"{chosen.name}-{number}")
    train(chosen, load_digits(), place, steps=steps, seed=seed, depth=depth, batch_size=batch_size)
    return load_run(place)


def _named(name: str) -> Recipe:
    for recipe in RECIPES:
        if recipe.name == name:
            return recipe
    names = ", ".join(repr(recipe.name) for recipe in RECIPES)
    raise ConfigurationError(f"recipe is {name!r}; there are {names}")


def _open(place: Path) -> Run | None:
    try:
        return load_run(place)
    except RunDirectoryError:
        return None
