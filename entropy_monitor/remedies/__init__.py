"""The cures: σReparam, what it is compared with, and the scale-invariant recipe."""

from __future__ import annotations
