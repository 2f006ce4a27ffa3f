"""What to do about each kind of trouble: the remedy that fits its cause, with the lines of code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from entropy_monitor.phrases import times

GROWN = 1.5
"""A ratio from which "has grown" is fair."""
_GRADIENT_GROWN = 10.0  # gradients move that much in sound runs too, within a factor of a few

_CONVERT = '`em.sigma_reparam(model, gamma="preserve")` and `em.convert_optimizer(optimizer, model)`'
_FROM_SCRATCH = (
    "`em.remove_layer_norms(model)`, `em.reinitialise(model)`, "
    '`em.sigma_reparam(model, gamma="one")`, then `em.param_groups(model, lr)` for the optimizer'
)
_CLIP = "`clip = em.QKClip(model, optimizer)`"


def collapse(since: int, evidence: Mapping[str, Any]) -> str:
    """What to do about a collapse of entropy.

    Args:
        since: step of the first sign.
        evidence: of the alert.
    """
    back = (
        f"Go back to a checkpoint from before step {since}: what is done to the run now steadies it, and "
        "does not "
        "revive a collapsed head"
    )
    if _weights_drive(evidence):
        cure = (
            "From there lower the learning rate or lengthen its warmup, or keep the weights' spectral norms "
            f"from growing with every update by σReparam (Zhai et al. 2023): {_CONVERT}. To train anew at "
            f"this learning rate: {_FROM_SCRATCH}. Where σReparam is in place already, lower the learning "
            "rate of γ"
        )
    elif _logits_drive(evidence):
        cure = (
            "The weights have not driven it, so bound the logits themselves: QK-clip, "
            f"{_CLIP}, or normalise queries and keys (QK-norm). A lower learning rate or a longer warmup "
            "helps too"
        )
    else:
        cure = (
            "Then lower the learning rate or lengthen its warmup; if that is not enough, σReparam: "
            f"{_CONVERT}"
        )
    return _text(back, cure, _about_gradients(evidence))


def logits(since: int, evidence: Mapping[str, Any]) -> str:
    """What to do about exploding logits."""
    first = f"Keep a checkpoint from before step {since}, and watch the entropy of these heads"
    clip = f"Bound the logits by QK-clip: {_CLIP}"
    if _weights_drive(evidence):
        cure = f"{clip}; or bound the weights that drive them by σReparam (Zhai et al. 2023): {_CONVERT}"
    else:
        cure = f"{clip}; or by normalising queries and keys (QK-norm)"
    rest = (
        "A lower learning rate or a longer warmup slows them. In mixed precision compute attention in "
        "float32: "
        "`em.fp32_attention(model)`"
    )
    return _text(first, cure, rest, _about_gradients(evidence))


def non_finite(since: int, evidence: Mapping[str, Any]) -> str:
    """What to do about NaN and infinity."""
    return _text(
        f"Stop the run and go back to a checkpoint from before step {since}: weights that took in a NaN do "
        "not "
        "recover",
        "Look at the batch of that step, at float16 overflow and loss scaling, and at the largest logits "
        "just before",
        "In mixed precision compute attention in float32: `em.fp32_attention(model)`; large logits are "
        "bounded by "
        f"{_CLIP}; a lower learning rate, a longer warmup or gradient clipping is the usual cure of the rest",
        "With automatic loss scaling a single skipped step is normal",
        _about_gradients(evidence),
    )


def uniform() -> str:
    """What to do about attention that stays uniform."""
    return _text(
        "Check that the inputs differ from one another and reach the model, and that the attention weights "
        "receive "
        "gradients",
        "Then change the learning rate (lower it if the first steps were large), or where normalisation "
        "stands; "
        "another seed tells whether it is chance",
        "Where weights were drawn too small or too large, draw them anew: `em.reinitialise(model)`",
        "A model with σReparam from γ = 1 that keeps its layer norms may stay like this: "
        "`em.sigma_reparam(model, "
        'gamma="preserve")`, or without the norms, `em.remove_layer_norms(model)`',
    )


def _weights_drive(evidence: Mapping[str, Any]) -> bool:
    return bool(evidence.get("sigma_qk_growth", 0.0) >= GROWN)


def _logits_drive(evidence: Mapping[str, Any]) -> bool:
    """Whether logits have grown, and the weights are known not to have."""
    return "sigma_qk_growth" in evidence and bool(evidence.get("max_logit_growth", 0.0) >= GROWN)


def _about_gradients(evidence: Mapping[str, Any]) -> str:
    """The other instability of vision Transformers: gradients of early layers spike (Chen et al. 2021)."""
    growth = evidence.get("grad_linf_growth", 0.0)
    if growth < _GRADIENT_GROWN:
        return ""
    return (
        f"The largest gradient of these weights has grown {times(growth)}: clip gradients, and in a vision "
        "model "
        "freeze the patch embedding, `em.freeze_patch_embedding(model)`"
    )


def _text(*sentences: str) -> str:
    return " ".join(f"{sentence}." for sentence in sentences if sentence)
