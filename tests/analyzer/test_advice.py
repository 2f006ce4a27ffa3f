"""The advice names the remedy that fits the cause, in code that runs."""

from __future__ import annotations

import ast
import inspect
import re
from typing import Any

import pytest

import entropy_monitor as em
from entropy_monitor.analyzer import advice

WEIGHTS = {"sigma_qk_growth": 12.0, "max_logit_growth": 100.0}
LOGITS = {"sigma_qk_growth": 1.1, "max_logit_growth": 100.0}
GRADIENTS = {"grad_linf_growth": 40.0}
CAUSES: dict[str, dict[str, Any]] = {"weights": WEIGHTS, "logits": LOGITS, "gradients": GRADIENTS, "none": {}}


def texts() -> dict[str, str]:
    found = {"uniform": advice.uniform()}
    for name, evidence in CAUSES.items():
        for about in (advice.collapse, advice.logits, advice.non_finite):
            found[f"{about.__name__} {name}"] = about(30, evidence)
    return found


@pytest.mark.parametrize("name", texts())
def test_every_line_of_code_can_be_called(name: str) -> None:
    text = texts()[name]
    lines = re.findall("`([^`]+)`", text)
    assert lines
    for line in lines:
        calls = [node for node in ast.walk(ast.parse(line)) if isinstance(node, ast.Call)]
        assert calls, line
        for call in calls:
            assert isinstance(call.func, ast.Attribute)
            function = getattr(em, call.func.attr)
            inspect.signature(function).bind(*call.args, **{str(k.arg): k.value for k in call.keywords})


@pytest.mark.parametrize("name", texts())
def test_it_is_made_of_sentences(name: str) -> None:
    text = texts()[name]
    assert text.endswith(".")
    assert ".." not in text
    assert "  " not in text


def test_weights_that_drive_a_collapse_are_reparametrized() -> None:
    text = advice.collapse(30, WEIGHTS)
    assert 'em.sigma_reparam(model, gamma="preserve")' in text
    assert "em.convert_optimizer(optimizer, model)" in text
    assert "em.remove_layer_norms(model)" in text
    assert "QKClip" not in text


def test_logits_that_grow_without_the_weights_are_clipped() -> None:
    text = advice.collapse(30, LOGITS)
    assert "em.QKClip(model, optimizer, threshold=10)" in text
    assert "sigma_reparam" not in text


@pytest.mark.parametrize("max_logit", [30.0, 96.0, 400.0, 1e5])
def test_the_clip_lies_below_the_logits_that_are_there(max_logit: float) -> None:
    text = advice.collapse(30, LOGITS | {"max_logit": max_logit})
    (threshold,) = re.findall(r"threshold=(\d+)", text)
    assert 10 <= float(threshold) <= min(100, max_logit / 2)


def test_exploded_logits_of_collapsed_heads_are_not_made_light_of() -> None:
    assert "have collapsed already" in advice.logits(80, WEIGHTS | {"entropy_share": 0.008})
    assert "Keep a checkpoint from before step 80" in advice.logits(80, WEIGHTS | {"entropy_share": 0.5})


@pytest.mark.parametrize("evidence", CAUSES.values())
def test_a_collapsed_head_is_not_promised_back(evidence: dict[str, Any]) -> None:
    text = advice.collapse(30, evidence)
    assert "checkpoint from before step 30" in text
    assert "does not revive a collapsed head" in text


def test_gradients_that_spike_name_the_patch_embedding() -> None:
    assert "em.freeze_patch_embedding(model)" in advice.logits(30, GRADIENTS)
    assert "freeze_patch_embedding" not in advice.logits(30, WEIGHTS)
