"""Every way of compiling: the training is the same to the bit, and every call is read once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compiled.figures import WHICH, assert_same_figures, assert_same_rows
from tests.compiled.modes import EVERY, MODES, STEPS, Mode, in_eager_mode, train
from tests.test_unchanged_training import same

CASES = [
    pytest.param(mode, id=name, marks=[pytest.mark.full] if mode.slow else []) for name, mode in MODES.items()
]
# These amplify what rounding leaves between eager and compiled training: as e^x, and as a quotient.
AMPLIFIED = {"floor_weights": 20, "floor_paper": 20, "update_entropy": 20, "update_sigma": 20}


@pytest.mark.parametrize("mode", CASES)
def test_watched_equals_unwatched(mode: Mode, tmp_path: Path) -> None:
    plain = train(mode)
    watched = train(mode, tmp_path / "compiled")
    assert plain.graphs[-1] > 0  # it was compiled at all
    for name, value in plain.left.items():
        assert same(value, watched.left[name]), name
    assert watched.faults == {}

    # The version that reads breaks where the user's does, and neither is compiled again and again.
    assert watched.breaks.keys() == plain.breaks.keys()
    assert bool(plain.breaks) == mode.breaks
    for why, times in watched.breaks.items():
        assert times <= 2 * plain.breaks[why]
    assert watched.graphs[-1] <= 2 * plain.graphs[-1]
    if plain.graphs[0] == plain.graphs[-1]:
        assert watched.graphs[EVERY - 1] == watched.graphs[-1]

    eager = train(in_eager_mode(mode), tmp_path / "eager")
    assert eager.graphs[-1] == 0
    assert_same_rows(watched.heads, eager.heads, ["step", *WHICH])
    assert sorted(set(watched.heads.step)) == list(range(0, STEPS, EVERY))
    if mode.same_training:
        assert_same_figures(watched.heads, eager.heads, mode.tolerance, mode.unknown, AMPLIFIED)
        # Gradients are sums of both signs.
        assert_same_figures(watched.layers, eager.layers, 10 * mode.tolerance, mode.unknown, AMPLIFIED)
    else:
        for figure in ("entropy", "max_entropy", "max_logit", "sigma_qk", "floor_weights"):
            assert watched.heads[figure].notna().all()
