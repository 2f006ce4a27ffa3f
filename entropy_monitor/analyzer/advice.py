"""What to do about each kind of trouble: the remedy that fits its cause, with the lines of code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from entropy_monitor.phrases import times

GROWN = 1.5
"""A ratio from which "has grown" is fair."""
_GRADIENT_GROWN = 10.0  # gradients move by less in sound runs
_COLLAPSED = 0.1  # share of the maximal entropy
_LEAST_CLIP, _MOST_CLIP = (
    10,
    100,
)  # logits: a fall shows from about the first; the second is QK-clip's own default

_CONVERT = '`em.sigma_reparam(model, gamma="preserve")` and `em.convert_optimizer(optimizer, model)`'
_FROM_SCRATCH = (
    "`em.remove_layer_norms(model)`, `em.reinitialise(model)`, "
    '`em.sigma_reparam(model, gamma="one")`, and `em.param_groups(model, lr, gamma_lr=1.0)` for the optimizer'
)
_IN_PLACE = "Where σReparam is in place already, lower the learning rate of γ instead"
_NORMALISE = "normalise queries and keys (QK-norm), if the model does not yet"


def collapse(since: int, evidence: Mapping[str, Any]) -> str:
    """What to do about a collapse of entropy.

    Args:
        since: step of the first sign.
        evidence: of the alert.
    """
    back = (
        f"Go back to a checkpoint from before step {since}: what is done to the run now may steady it, and "
        "does "
        "not revive a collapsed head"
    )
    if _weights_drive(evidence):
        cure = (
            "From there lower the learning rate or lengthen its warmup, or keep the weights' spectral norms "
            "from "
            f"growing with every update by σReparam (Zhai et al. 2023): {_CONVERT}. To train anew at this "
            f"learning rate: {_FROM_SCRATCH}. {_IN_PLACE}"
        )
    elif _logits_drive(evidence):
        cure = (
            f"The weights have not driven it, so bound the logits themselves: QK-clip, {_clip(evidence)}, or "
            f"{_NORMALISE}. A lower learning rate or a longer warmup helps too"
        )
    else:
        cure = (
            "Then lower the learning rate or lengthen its warmup; if that is not enough, σReparam: "
            f"{_CONVERT}. {_IN_PLACE}"
        )
    return _text(back, cure, _about_gradients(evidence))


def logits(since: int, evidence: Mapping[str, Any]) -> str:
    """What to do about exploding logits."""
    if evidence.get("entropy_share", 1.0) <= _COLLAPSED:
        first = (
            "These heads have collapsed already: go back to a checkpoint from before they did; what is done "
            "to the "
            "run now may steady it, and does not revive them"
        )
    else:
        first = f"Keep a checkpoint from before step {since}, and watch the entropy of these heads"
    clip = f"Bound the logits by QK-clip: {_clip(evidence)}"
    if _weights_drive(evidence):
        cure = (
            f"{clip}; or bound the weights that drive them by σReparam (Zhai et al. 2023): {_CONVERT}. "
            f"{_IN_PLACE}"
        )
    else:
        cure = f"{clip}; or {_NORMALISE}"
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
        "just "
        "before",
        "In mixed precision compute attention in float32: `em.fp32_attention(model)`; large logits are "
        "bounded "
        "by `clip = em.QKClip(model, optimizer)`; a lower learning rate, a longer warmup or gradient "
        "clipping is "
        "the usual cure of the rest",
        "With automatic loss scaling a single skipped step is normal",
        _about_gradients(evidence),
    )


def uniform() -> str:
    """What to do about attention that stays uniform."""
    return _text(
        "Check that the inputs differ from one another and reach the model, and that the attention weights "
        "receive gradients",
        "Then change the learning rate (lower it if the first steps were large), the scale that weights are "
        "drawn "
        "with (`em.reinitialise(model)`, before training), or where normalisation stands; another seed tells "
        "whether it is chance",
        "A model with σReparam from γ = 1 that keeps its layer norms may stay like this: begin anew with "
        '`em.sigma_reparam(model, gamma="preserve")`, or without the norms, `em.remove_layer_norms(model)`',
    )


def _clip(evidence: Mapping[str, Any]) -> str:
    """QK-clip with a threshold well below the logits that are there."""
    threshold = round(min(_MOST_CLIP, max(_LEAST_CLIP, evidence.get("max_logit", 0.0) / 10)))
    return f"`clip = em.QKClip(model, optimizer, threshold={threshold})`"


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
