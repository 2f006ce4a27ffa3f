from __future__ import annotations

import math

import pytest

from entropy_monitor.analyzer import wording


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.08, "0.08"), (2.7726, "2.77"), (212.4, "212"), (11273.0, "11,273"), (1.5e-5, "1.5e-05"),
     (2.5e7, "2.5e+07"), (-3.0, "-3"), (9.999, "10"), (99.96, "100"), (math.inf, "inf")],
)  # fmt: skip
def test_number(value: float, text: str) -> None:
    assert wording.number(value) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.96, "96 %"), (0.034, "3 %"), (0.009, "0.9 %"), (0.0001, "less than 0.1 %"), (0, "0.0 %")],
)
def test_percent(share: float, text: str) -> None:
    assert wording.percent(share) == text


@pytest.mark.parametrize(
    ("which", "of", "text"),
    [((3,), 4, "head 3 of 4"), ((0, 1, 3), 4, "heads 0, 1 and 3 of 4"), ((0, 1, 2, 3), 4, "all 4 heads"),
     ((0,), 1, "head 0 of 1"), ((0, 1, 2, 5, 8, 9, 10, 11), 12, "heads 0–2, 5 and 8–11 of 12"),
     ((0, 1), 4, "heads 0 and 1 of 4")],
)  # fmt: skip
def test_heads(which: tuple[int, ...], of: int, text: str) -> None:
    assert wording.heads(which, of) == text


def test_drivers_name_weights_and_logits() -> None:
    evidence = {
        "start_step": 0.0, "sigma_qk": 7.5, "sigma_qk_at_start": 0.6, "sigma_qk_growth": 12.5,
        "max_logit": 212.0, "max_logit_at_start": 1.3, "max_logit_growth": 163.0, "grad_linf": 0.25,
    }  # fmt: skip
    assert wording.drivers(evidence) == (
        "The spectral norm of W_K W_Qᵀ has grown 12.5× since step 0 (0.6 to 7.5). "
        "The largest logit has grown 163× (1.3 to 212). "
        "The logits have grown more than these weights: the inputs to attention have grown or aligned "
        "with them too. Largest gradient of the attention weights: 0.25"
    )


def test_drivers_name_the_inputs_where_the_weights_have_not_grown() -> None:
    evidence = {
        "sigma_qk": 0.6, "sigma_qk_at_start": 0.6, "sigma_qk_growth": 1.0,
        "max_logit": 212.0, "max_logit_at_start": 1.3, "max_logit_growth": 163.0,
    }  # fmt: skip
    assert "have hardly grown (1.0×): the inputs to attention" in wording.drivers(evidence)


def test_what_is_not_known_is_not_said() -> None:
    assert wording.drivers({}) == ""
    assert wording.loss_course({}, 0.05, may_be_sound=True) == ""
    assert wording.entropy_state({}) == ""
    assert wording.entropy_fall({}) == "entropy has fallen"
    assert wording.sentences("a", "", "b") == "a. b."


def test_the_loss_decides_how_sure_the_words_are() -> None:
    stalled = {"loss": 2.33, "loss_at_start": 2.34}
    learning = {"loss": 0.56, "loss_at_start": 2.34}
    assert wording.loss_course(stalled, 0.05, may_be_sound=True) == (
        "The loss has not improved (2.34 at the start, 2.33 now)"
    )
    assert "this may be sound specialisation" in wording.loss_course(learning, 0.05, may_be_sound=True)
    assert wording.loss_course(learning, 0.05, may_be_sound=False) == (
        "The loss has improved so far (2.34 at the start, 0.56 now)"
    )


@pytest.mark.parametrize(
    ("value", "step"), [(100.0, 0.5), (128.0, 1.0), (256.0, 2.0), (1000.0, 4.0), (0.0, 2**-7)]
)
def test_bfloat16_step(value: float, step: float) -> None:
    assert wording.bfloat16_step(value) == step
