"""Which transforms of `torch.func` are running."""

from __future__ import annotations

import torch
from torch._C._functorch import TransformType

IN_VMAP = "it runs inside torch.func.vmap, where a tensor is many and none can be kept"


def is_inside() -> bool:
    """Whether any transform is."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_inside_vmap() -> bool:
    """Whether vmap is, perhaps around others: what is made of its tensors is lost when it ends."""
    if not is_inside():
        return False
    return any(
        level.key() == TransformType.Vmap for level in torch._C._functorch.get_interpreter_stack() or ()
    )
