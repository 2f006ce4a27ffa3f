"""Families of models by name, in tiny random configurations, against dense float64 references."""

from __future__ import annotations

from tests.families import decoders, encoders, handmade, latent, seq2seq
from tests.families.family import FAMILIES, Call, Family
from tests.families.reference import DenseCall, dense_calls

__all__ = [
    "FAMILIES",
    "Call",
    "DenseCall",
    "Family",
    "decoders",
    "dense_calls",
    "encoders",
    "handmade",
    "latent",
    "seq2seq",
]
