"""Small models, written as people write them, each with a dense float64 account of its attention."""

from __future__ import annotations

from tests.zoo import decoders, encoders, handmade, unusual
from tests.zoo.dense import ZOO, Dense, Entry, figures

__all__ = ["ZOO", "Dense", "Entry", "decoders", "encoders", "figures", "handmade", "unusual"]
