"""Diagnose Transformer training through attention entropy.

`measure` and `capture` look at a model once, `EntropyMonitor` watches a training run, `load_run` reads what a
run left.
"""

from __future__ import annotations

from entropy_monitor.analyzer import Thresholds
from entropy_monitor.capture import capture, measure
from entropy_monitor.errors import (
    AttentionNotFoundError,
    ConfigurationError,
    EntropyMonitorError,
    MissingExtraError,
    RunDirectoryError,
)
from entropy_monitor.hooks.registry import Projections, Registration, register_projections
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
