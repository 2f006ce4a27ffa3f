"""Diagnose Transformer training through attention entropy.

`measure` and `capture` look at a model once, `EntropyMonitor` watches a training run, `load_run` reads what a
run left.

Names are loaded when they are first used: reading a run does not need torch, which takes seconds to load.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from entropy_monitor.analyzer import Thresholds
    from entropy_monitor.errors import (
        AttentionNotFoundError,
        ConfigurationError,
        EntropyMonitorError,
        MissingExtraError,
        RunDirectoryError,
    )
    from entropy_monitor.hooks.registry import Projections, Registration, register_projections
    from entropy_monitor.looking import capture, measure
    from entropy_monitor.monitor import EntropyMonitor, StepReport
    from entropy_monitor.records import Alert, AlertEvent, Record, RunInfo, Sink
    from entropy_monitor.remedies import (
        AttentionPrecision,
        ClippedHead,
        Homogeneity,
        QKClip,
        RelativeClip,
        convert_optimizer,
        fold,
        fold_state_dict,
        fp32_attention,
        freeze_patch_embedding,
        param_groups,
        probe_homogeneity,
        qk_clip_,
        reinitialise,
        relative_global_clip_,
        remove_layer_norms,
        scale_invariant_attention,
        sigma_reparam,
        spectral_norm,
        weight_norm,
    )
    from entropy_monitor.run import Run, load_run

__version__ = "0.1.0"

_HOMES = {
    "Alert": "entropy_monitor.records",
    "AlertEvent": "entropy_monitor.records",
    "AttentionNotFoundError": "entropy_monitor.errors",
    "AttentionPrecision": "entropy_monitor.remedies",
    "ClippedHead": "entropy_monitor.remedies",
    "ConfigurationError": "entropy_monitor.errors",
    "EntropyMonitor": "entropy_monitor.monitor",
    "EntropyMonitorError": "entropy_monitor.errors",
    "Homogeneity": "entropy_monitor.remedies",
    "MissingExtraError": "entropy_monitor.errors",
    "Projections": "entropy_monitor.hooks.registry",
    "QKClip": "entropy_monitor.remedies",
    "Record": "entropy_monitor.records",
    "Registration": "entropy_monitor.hooks.registry",
    "RelativeClip": "entropy_monitor.remedies",
    "Run": "entropy_monitor.run",
    "RunDirectoryError": "entropy_monitor.errors",
    "RunInfo": "entropy_monitor.records",
    "Sink": "entropy_monitor.records",
    "StepReport": "entropy_monitor.monitor",
    "Thresholds": "entropy_monitor.analyzer",
    "capture": "entropy_monitor.looking",
    "convert_optimizer": "entropy_monitor.remedies",
    "fold": "entropy_monitor.remedies",
    "fold_state_dict": "entropy_monitor.remedies",
    "fp32_attention": "entropy_monitor.remedies",
    "freeze_patch_embedding": "entropy_monitor.remedies",
    "load_run": "entropy_monitor.run",
    "measure": "entropy_monitor.looking",
    "param_groups": "entropy_monitor.remedies",
    "probe_homogeneity": "entropy_monitor.remedies",
    "qk_clip_": "entropy_monitor.remedies",
    "register_projections": "entropy_monitor.hooks.registry",
    "reinitialise": "entropy_monitor.remedies",
    "relative_global_clip_": "entropy_monitor.remedies",
    "remove_layer_norms": "entropy_monitor.remedies",
    "scale_invariant_attention": "entropy_monitor.remedies",
    "sigma_reparam": "entropy_monitor.remedies",
    "spectral_norm": "entropy_monitor.remedies",
    "weight_norm": "entropy_monitor.remedies",
}

__all__ = [
    "Alert",
    "AlertEvent",
    "AttentionNotFoundError",
    "AttentionPrecision",
    "ClippedHead",
    "ConfigurationError",
    "EntropyMonitor",
    "EntropyMonitorError",
    "Homogeneity",
    "MissingExtraError",
    "Projections",
    "QKClip",
    "Record",
    "Registration",
    "RelativeClip",
    "Run",
    "RunDirectoryError",
    "RunInfo",
    "Sink",
    "StepReport",
    "Thresholds",
    "capture",
    "convert_optimizer",
    "fold",
    "fold_state_dict",
    "fp32_attention",
    "freeze_patch_embedding",
    "load_run",
    "measure",
    "param_groups",
    "probe_homogeneity",
    "qk_clip_",
    "register_projections",
    "reinitialise",
    "relative_global_clip_",
    "remove_layer_norms",
    "scale_invariant_attention",
    "sigma_reparam",
    "spectral_norm",
    "weight_norm",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
