from __future__ import annotations

import pytest

from entropy_monitor.analyzer import wording


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
