"""Which keys an attention mask hides, and the part of a mask that some query rows need."""

from __future__ import annotations

import torch
from torch import Tensor

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.measures._precision import MAX_BYTES, on_host

_HIDING = -1e9
_HIDING_LOGIT = -5e8  # a mask's -1e9 plus any logit that a model could have
_HALF_HIDING_LOGIT = (-1.02e4, -0.98e4)  # a mask's -1e4 plus a logit of usual size
_VISIBLE_LOGIT = -1e3
_TWO_VALUED = -1e4
# A mask written in bfloat16 holds -1e9 as -998244352 and -1e4 as -9984, also after it was cast up.
_ROUNDED = 2.0**-8


def hidden(mask: Tensor, two_valued: Tensor | None = None) -> Tensor:
    """Tell which keys a mask hides; every other value is a bias on a key that is seen.

    An additive (floating) mask hides where it is -inf, at most -1e9, at most half of its dtype's
    lowest finite value, or -1e4 in a mask of just the two values 0 and -1e4. A boolean mask hides
    where it is False, as in `scaled_dot_product_attention`. Nothing here waits for the device.

    Args:
        mask: boolean or floating, any shape, in the dtype in which it was built.
        two_valued: `is_two_valued` of the whole mask, when `mask` is only a part of it.

    Returns:
        Boolean tensor of the mask's shape, True = hidden. NaN counts as seen.

    Raises:
        ConfigurationError: if the mask is neither boolean nor floating.
    """
    if mask.dtype == torch.bool:
        return ~mask
    _require_floating(mask)
    limit = hiding_limit(mask.dtype)
    if two_valued is None:
        two_valued = is_two_valued(mask)
    return (mask <= limit) | (_is_ten_thousand(mask) & two_valued)


def hiding_limit(dtype: torch.dtype) -> float:
    """The largest value of an additive mask that hides a key, whatever the others are."""
    return max(_HIDING * (1 - _ROUNDED), torch.finfo(dtype).min / 2)


def hidden_logits(logits: Tensor) -> Tensor:
    """Tell which keys were hidden by a mask that is already added to the logits.

    Hidden is what is -inf, at most -5e8, at most half of the dtype's lowest finite value, or within
    2 % of -1e4 in a row whose largest logit is above -1e3.

    Args:
        logits: `[..., Tk]` as they enter the softmax, in the dtype in which the mask was added.

    Returns:
        Boolean tensor of the logits' shape, True = hidden.
    """
    low, high = _HALF_HIDING_LOGIT
    limit = max(_HIDING_LOGIT, torch.finfo(logits.dtype).min / 2)
    if logits.shape[-1] == 0:
        return logits <= limit
    seen_elsewhere = logits.amax(-1, keepdim=True) > _VISIBLE_LOGIT
    return (logits <= limit) | ((logits >= low) & (logits <= high) & seen_elsewhere)


def is_two_valued(mask: Tensor, max_bytes: int = MAX_BYTES) -> Tensor:
    """Whether a floating mask holds nothing but 0 and -1e4, as older models write theirs.

    Args:
        mask: floating, any shape. Broadcast dimensions are read once.
        max_bytes: limit for temporaries; a larger mask is read in pieces.

    Returns:
        Boolean scalar tensor on the mask's device.

    Raises:
        ConfigurationError: if the mask is not floating.
    """
    _require_floating(mask)
    for dim, (size, stride) in enumerate(zip(mask.shape, mask.stride(), strict=True)):
        if size > 1 and stride == 0:
            mask = mask.narrow(dim, 0, 1)
    if on_host(mask) and mask.numel() and not _is_ten_thousand(mask.amin()):
        return torch.zeros((), dtype=torch.bool, device=mask.device)  # without reading it more than once
    return _only_two_values(mask, max_bytes)


def _only_two_values(mask: Tensor, max_bytes: int) -> Tensor:
    if mask.dim() and mask.numel() * (mask.element_size() + 4) > max_bytes:
        dim = max(range(mask.dim()), key=lambda d: mask.shape[d])
        half = mask.shape[dim] // 2
        if half:
            low = mask.narrow(dim, 0, half)
            high = mask.narrow(dim, half, mask.shape[dim] - half)
            return _only_two_values(low, max_bytes) & _only_two_values(high, max_bytes)
    return ((mask == 0) | _is_ten_thousand(mask)).all()


def _is_ten_thousand(mask: Tensor) -> Tensor:
    return (mask >= _TWO_VALUED * (1 + _ROUNDED)) & (mask <= _TWO_VALUED * (1 - _ROUNDED))


def _require_floating(mask: Tensor) -> None:
    if not mask.dtype.is_floating_point:
        raise ConfigurationError(
            f"an attention mask must be boolean (True = seen) or floating (added to the logits), "
            f"got {mask.dtype}; convert it with mask.bool() or mask.to(query.dtype)"
        )


def as_four_dimensions(mask: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """View a broadcastable mask as `[B or 1, H or 1, Tq or 1, Tk or 1]`, copying nothing.

    Args:
        mask: boolean or floating, of at most four dimensions, aligned at the last as broadcasting
            does.
        shape: `(B, H, Tq, Tk)` of the logits.

    Returns:
        A view of the mask with four dimensions.

    Raises:
        ConfigurationError: if the mask does not broadcast to `shape`, or is neither boolean nor
            floating.
    """
    if mask.dtype != torch.bool:
        _require_floating(mask)
    sizes = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if len(sizes) > 4 or any(m not in (1, n) for m, n in zip(sizes, shape, strict=True)):
        raise ConfigurationError(
            f"a mask of shape {tuple(mask.shape)} does not broadcast to the logits' shape {shape} "
            f"(batch, query heads, query rows, keys); expand or index it first"
        )
    return mask.reshape(sizes)


def cut(mask: Tensor, batch: slice, heads: slice, rows: slice | Tensor) -> Tensor:
    """Cut a mask to a block of the logits; broadcast dimensions stay 1.

    Args:
        mask: `[B or 1, H or 1, Tq or 1, Tk or 1]`.
        batch: sequences of the block.
        heads: query heads of the block.
        rows: query rows of the block: a slice (a view is returned) or indices (just these rows are
            copied).

    Returns:
        `[b or 1, h or 1, r or 1, Tk or 1]`.
    """
    if mask.shape[0] > 1:
        mask = mask[batch]
    if mask.shape[1] > 1:
        mask = mask[:, heads]
    if mask.shape[2] > 1:
        mask = mask[:, :, rows] if isinstance(rows, slice) else mask.index_select(2, rows)
    return mask
