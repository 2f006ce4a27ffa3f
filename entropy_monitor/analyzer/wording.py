"""Phrases that the detectors share: places and causes, in words a person understands."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from entropy_monitor.analyzer.advice import GROWN
from entropy_monitor.analyzer.detector import Finding
from entropy_monitor.phrases import heads, number, percent, times

_NOTABLE_LOGIT = 20.0  # below this a logit is no cause of anything


def where(finding: Finding) -> str:
    """The layer and its heads: "blocks.0.attn (heads 0 and 1 of 4)"."""
    return f"{finding.layer} ({heads(finding.heads, finding.of)})"


def sentences(*parts: str) -> str:
    """Parts as sentences, empty ones left out."""
    return " ".join(f"{part}." for part in parts if part)


def entropy_fall(evidence: Mapping[str, Any]) -> str:
    """How far entropy has fallen, and from where."""
    if "entropy_share" not in evidence:
        return "entropy has fallen"
    text = (
        f"entropy has fallen, furthest in head {evidence['worst_head']}: to "
        f"{percent(evidence['entropy_share'])} of its maximum "
        f"({number(evidence['entropy'])} of {number(evidence['max_entropy'])} nats)"
    )
    if "share_at_start" in evidence:
        text += f" from {percent(evidence['share_at_start'])} at step {evidence['start_step']:.0f}"
    return text


def entropy_state(evidence: Mapping[str, Any]) -> str:
    """Where entropy stands, told without judging it."""
    if "entropy_share" not in evidence:
        return ""
    return (
        f"The entropy of head {evidence['worst_head']} is at "
        f"{percent(evidence['entropy_share'])} of its maximum"
    )


def drivers(evidence: Mapping[str, Any]) -> str:
    """What drives it, as far as the figures show, in one or more sentences without the last full stop."""
    parts = []
    sigma, logit = evidence.get("sigma_qk_growth", 0.0), evidence.get("max_logit_growth", 0.0)
    since = f"step {evidence.get('start_step', 0):.0f}"
    if sigma >= GROWN:
        parts.append(
            f"The spectral norm of W_K W_Qᵀ has grown {times(sigma)} since {since} "
            f"({number(evidence['sigma_qk_at_start'])} to {number(evidence['sigma_qk'])})"
        )
    if evidence.get("max_logit", 0.0) >= _NOTABLE_LOGIT and logit >= GROWN:
        parts.append(
            f"The largest logit has grown {times(logit)} "
            f"({number(evidence['max_logit_at_start'])} to {number(evidence['max_logit'])})"
        )
        if 0 < sigma < GROWN:
            parts.append(
                f"These weights have hardly grown ({times(sigma)}): the inputs to attention, or "
                "what lies between them and the logits, have"
            )
        elif sigma > 0 and logit > 4 * sigma:
            parts.append(
                "The logits have grown more than these weights: the inputs to attention have "
                "grown or aligned with them too"
            )
    if evidence.get("grad_linf", 0.0) > 0:
        parts.append(f"Largest gradient of the attention weights: {number(evidence['grad_linf'])}")
    return ". ".join(parts)


def loss_course(evidence: Mapping[str, Any], stalled: float, *, may_be_sound: bool) -> str:
    """What the loss has done meanwhile, and what that means for how sure one can be."""
    if "loss" not in evidence or "loss_at_start" not in evidence:
        return ""
    loss, start = evidence["loss"], evidence["loss_at_start"]
    course = f"{number(start)} at the start, {number(loss)} now"
    if start - loss < stalled * abs(start):
        return f"The loss has not improved ({course})"
    if not may_be_sound:
        return f"The loss has improved so far ({course})"
    return (
        f"The loss has improved all the same ({course}); if it goes on doing so, on held-out "
        "data too, this may be sound specialisation"
    )


def bfloat16_step(value: float) -> float:
    """The distance between neighbouring bfloat16 numbers (8 significant bits) at a value of 1 or more."""
    return 2.0 ** (math.floor(math.log2(max(value, 1.0))) - 7)
