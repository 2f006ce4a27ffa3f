"""The detectors, in the order in which their alerts are given: what makes others meaningless comes first."""

from __future__ import annotations

from entropy_monitor.analyzer.capture_fault import CaptureFault
from entropy_monitor.analyzer.detector import Detector
from entropy_monitor.analyzer.entropy_collapse import EntropyCollapse
from entropy_monitor.analyzer.logit_explosion import LogitExplosion
from entropy_monitor.analyzer.non_finite import NonFinite
from entropy_monitor.analyzer.uniform_attention import UniformAttention

DETECTORS: tuple[type[Detector], ...] = (
    NonFinite,
    CaptureFault,
    EntropyCollapse,
    LogitExplosion,
    UniformAttention,
)
