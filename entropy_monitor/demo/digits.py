"""scikit-learn's handwritten digits, as patches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_monitor.errors import MissingExtraError

TOKENS, PATCH_SIZE, CLASSES = 16, 4, 10
_TRAINING = 1437  # four fifths of the 1,797 images


@dataclass(frozen=True)
class Digits:
    """Images as `[N, 16, 4]` patches, standardised, and their classes `[N]`; training and test part."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_digits() -> Digits:
    """The data set that ships with scikit-learn, in a fixed shuffled order."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "demo", "the demo") from error
    images, classes = datasets.load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32) / 16
    x = (x - x.mean()) / x.std()
    y = torch.tensor(classes)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x = x[order].view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, TOKENS, PATCH_SIZE)
    y = y[order]
    return Digits(x[:_TRAINING], y[:_TRAINING], x[_TRAINING:], y[_TRAINING:])
