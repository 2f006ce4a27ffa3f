"""What is measured: pure functions from tensors to tensors, without model and without I/O.

Entropies are in nats. Functions compute in float32, in float64 where an input is float64, with
autocast off and without gradients.
"""

from __future__ import annotations

from entropy_monitor.measures.activations import activation_norm, norm_at_least
from entropy_monitor.measures.bounds import (
    critical_sigma,
    entropy_lower_bound,
    minimising_logits,
)
from entropy_monitor.measures.floors import (
    ROUNDING_TOLERANCE,
    floor_activation,
    floor_paper,
    floor_row,
    floor_weights,
)
from entropy_monitor.measures.head_norms import bias_norm, head_norm, head_norms
from entropy_monitor.measures.leading import leading_singular_value
from entropy_monitor.measures.masks import hidden, hidden_logits, is_two_valued
from entropy_monitor.measures.rows import (
    RowStatistics,
    attention_entropy,
    attention_map,
    entropy_from_maps,
    row_statistics,
    row_statistics_from_logits,
    row_statistics_from_weights,
)
from entropy_monitor.measures.sampling import (
    rows_for,
    standard_error_of_sums,
    stratified_rows,
    stratified_standard_error,
    stratum_sums,
)
from entropy_monitor.measures.scale_invariance import (
    effective_learning_rate,
    equilibrium_gradient_norm,
    equilibrium_norm,
)
from entropy_monitor.measures.spectral import (
    sigma_qk,
    spectral_entropy,
    spectral_norm,
    spectral_norm_bound,
    spectrum,
    update_spectral_norm_bound,
)
from entropy_monitor.measures.update_spectrum import UpdateSpectrum, joint_spectrum, update_spectrum

__all__ = [
    "ROUNDING_TOLERANCE",
    "RowStatistics",
    "UpdateSpectrum",
    "activation_norm",
    "attention_entropy",
    "attention_map",
    "bias_norm",
    "critical_sigma",
    "effective_learning_rate",
    "entropy_from_maps",
    "entropy_lower_bound",
    "equilibrium_gradient_norm",
    "equilibrium_norm",
    "floor_activation",
    "floor_paper",
    "floor_row",
    "floor_weights",
    "head_norm",
    "head_norms",
    "hidden",
    "hidden_logits",
    "is_two_valued",
    "joint_spectrum",
    "leading_singular_value",
    "minimising_logits",
    "norm_at_least",
    "row_statistics",
    "row_statistics_from_logits",
    "row_statistics_from_weights",
    "rows_for",
    "sigma_qk",
    "spectral_entropy",
    "spectral_norm",
    "spectral_norm_bound",
    "spectrum",
    "standard_error_of_sums",
    "stratified_rows",
    "stratified_standard_error",
    "stratum_sums",
    "update_spectral_norm_bound",
    "update_spectrum",
]
