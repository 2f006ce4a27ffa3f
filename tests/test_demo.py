"""The demonstration shows what it promises: a collapse is told, a sound run is left in peace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from entropy_monitor import load_run
from entropy_monitor.demo import Recipe, demo_run
from entropy_monitor.demo.digits import load_digits
from entropy_monitor.demo.show import _fresh
from entropy_monitor.demo.training import RECIPES, train
from entropy_monitor.errors import ConfigurationError
from tests.conftest import DEMO_STEPS, Demo

pytestmark = pytest.mark.xdist_group("demo")


def test_the_collapsing_run_is_told_and_the_sound_one_is_not(demo: Demo) -> None:
    sound, too_fast = load_run(demo.folder / "sound"), load_run(demo.folder / "too-fast")
    assert sound.alerts.empty
    collapses = too_fast.alerts[too_fast.alerts["kind"] == "entropy_collapse"]
    assert not collapses.empty
    assert collapses["opened"].min() <= 60
    assert not sound.problems
    assert not too_fast.problems


def test_the_first_layer_collapses_in_the_figures_themselves(demo: Demo) -> None:
    heads = load_run(demo.folder / "too-fast").heads
    last = heads[heads["step"] == heads["step"].max()]
    share = (last["entropy"] / last["max_entropy"]).groupby(last["layer_index"]).mean()
    assert share[0] <= 0.07
    sound = load_run(demo.folder / "sound").heads
    assert (sound["entropy"] / sound["max_entropy"]).min() > 0.5


def test_the_cured_run_is_sound_at_the_same_learning_rate(demo: Demo) -> None:
    cured = load_run(demo.folder / "cured")
    assert cured.alerts.empty
    assert not cured.problems
    last = cured.heads[cured.heads["step"] == cured.heads["step"].max()]
    share = (last["entropy"] / last["max_entropy"]).groupby(last["layer_index"]).mean()
    assert share[0] > 0.5  # where the same rate collapses it to nothing
    assert cured.loss.iloc[-10:].mean() < 0.5 * load_run(demo.folder / "too-fast").loss.iloc[-10:].mean()
    recipes = {recipe.name: recipe for recipe in RECIPES}
    assert (recipes["cured"].learning_rate, recipes["cured"].warmup) == (
        recipes["too-fast"].learning_rate,
        recipes["too-fast"].warmup,
    )


@pytest.mark.full
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_cure_works_to_the_end_of_training(tmp_path: Path, seed: int) -> None:
    recipes = {recipe.name: recipe for recipe in RECIPES}
    digits = load_digits()
    ill, cured = (train(recipes[name], digits, tmp_path / name, seed=seed) for name in ("too-fast", "cured"))
    assert {alert.kind for alert in ill.alerts} >= {"entropy_collapse"}
    assert not cured.alerts
    assert ill.accuracy < 0.85
    assert cured.accuracy > 0.9


def test_every_measured_step_and_every_loss_is_kept(demo: Demo) -> None:
    run = load_run(demo.folder / "too-fast")
    assert sorted(run.heads["step"].unique()) == list(range(0, DEMO_STEPS, 10))
    assert len(run.heads) == DEMO_STEPS // 10 * 6 * 4
    assert list(run.loss.index) == list(range(DEMO_STEPS))
    assert run.heads["floor_row"].notna().all()
    in_full = (run.heads["step"] < 80) | (run.heads["step"] % 40 == 0)
    for column in ("floor_activation", "floor_weights", "sigma_qk"):
        assert run.heads[column][in_full].notna().all(), column
    assert run.layers[(run.layers["step"] < 80) | (run.layers["step"] % 40 == 0)].notna().all().all()


def test_what_it_says_leads_to_what_it_wrote(demo: Demo) -> None:
    assert "Attention entropy" in demo.output
    assert "What to do:" in demo.output
    assert "blocks.0.attn" in demo.output
    page = re.search(r"report +(\S+report\.html)", demo.output)
    assert page is not None
    assert Path(page[1]).is_file()
    for name in ("sound", "too-fast", "cured"):
        assert list((demo.folder / name / "tensorboard").glob("events.*"))
        assert list((demo.folder / name / "wandb").glob("wandb/offline-run-*/*.wandb"))
        assert name in demo.output


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    taken = tmp_path / "demo"
    taken.mkdir()
    assert _fresh(taken) == tmp_path / "demo-2"
    assert _fresh(taken) == tmp_path / "demo-3"


def test_digits_are_cut_into_patches() -> None:
    from sklearn import datasets

    digits = load_digits()
    assert digits.train_x.shape == (1437, 16, 4)
    images = torch.tensor(datasets.load_digits(return_X_y=True)[0], dtype=torch.float64) / 16
    images = ((images - images.mean()) / images.std()).view(-1, 8, 8)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    image = images[order[5]]
    for row in range(4):
        for column in range(4):
            patch = image[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten()
            ours = digits.train_x[5, 4 * row + column].double()
            torch.testing.assert_close(ours, patch, rtol=1e-5, atol=1e-6)


def test_a_run_for_notebooks_is_trained_once(tmp_path: Path) -> None:
    recipe = Recipe("tiny", "for a test", 1e-3, 0)
    small = {"depth": 1, "batch_size": 8}
    first = demo_run(recipe, tmp_path, steps=3, **small)
    assert first.path == tmp_path / "tiny"
    assert list(first.loss.index) == [0, 1, 2]
    assert first.layer_names == ["blocks.0.attn"]
    assert demo_run(recipe, tmp_path, steps=2, **small).path == first.path
    longer = demo_run(recipe, tmp_path, steps=4, **small)
    assert longer.path == tmp_path / "tiny-2"
    assert list(first.refresh().loss.index) == [0, 1, 2]  # the shorter one is left as it was
    assert demo_run(recipe, tmp_path, steps=4, **small).path == longer.path
    (tmp_path / "other").mkdir()  # no run: left alone, and not an error
    assert demo_run(Recipe("other", "", 1e-3, 0), tmp_path, steps=1, **small).path == tmp_path / "other-2"
    with pytest.raises(ConfigurationError, match="recipe is 'fast'; there are 'sound', 'too-fast', 'cured'"):
        demo_run("fast", tmp_path)
