"""The cures: σReparam, what it is compared with, and the scale-invariant recipe."""

from __future__ import annotations

from entropy_monitor.remedies.attention_precision import AttentionPrecision, fp32_attention
from entropy_monitor.remedies.layer_norms import remove_layer_norms
from entropy_monitor.remedies.patch_embedding import freeze_patch_embedding
from entropy_monitor.remedies.qk_clip.clip import ClippedHead, QKClip, qk_clip_
from entropy_monitor.remedies.reinitialisation import reinitialise
from entropy_monitor.remedies.reparametrization.convert import sigma_reparam, spectral_norm, weight_norm
from entropy_monitor.remedies.reparametrization.folding import fold, fold_state_dict
from entropy_monitor.remedies.reparametrization.optimizers import convert_optimizer, param_groups
from entropy_monitor.remedies.scale_invariance.attention import scale_invariant_attention
from entropy_monitor.remedies.scale_invariance.clipping import RelativeClip, relative_global_clip_
from entropy_monitor.remedies.scale_invariance.homogeneity import probe_homogeneity
from entropy_monitor.remedies.scale_invariance.report import Homogeneity

__all__ = [
    "AttentionPrecision",
    "ClippedHead",
    "Homogeneity",
    "QKClip",
    "RelativeClip",
    "convert_optimizer",
    "fold",
    "fold_state_dict",
    "fp32_attention",
    "freeze_patch_embedding",
    "param_groups",
    "probe_homogeneity",
    "qk_clip_",
    "reinitialise",
    "relative_global_clip_",
    "remove_layer_norms",
    "scale_invariant_attention",
    "sigma_reparam",
    "spectral_norm",
    "weight_norm",
]
