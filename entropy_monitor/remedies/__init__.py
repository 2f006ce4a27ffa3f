"""The cures: σReparam, what it is compared with, and the scale-invariant recipe."""

from __future__ import annotations

from entropy_monitor.remedies.folding import fold, fold_state_dict
from entropy_monitor.remedies.optimizers import convert_optimizer, param_groups
from entropy_monitor.remedies.reparametrization import sigma_reparam, spectral_norm, weight_norm

__all__ = [
    "convert_optimizer",
    "fold",
    "fold_state_dict",
    "param_groups",
    "sigma_reparam",
    "spectral_norm",
    "weight_norm",
]
