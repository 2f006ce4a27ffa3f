"""Diagnose Transformer training through attention entropy."""

from __future__ import annotations

from entropy_monitor.capture import capture, measure

__all__ = ["capture", "measure"]
