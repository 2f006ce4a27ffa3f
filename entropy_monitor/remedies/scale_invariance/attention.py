"""Attention weights that scaling the scores does not change, in place of a softmax (Li et al. 2022)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from entropy_monitor.errors import ConfigurationError

_HIDDEN = -9.9e8  # -1e9 hides, and bfloat16 rounds that up


def scale_invariant_attention(scores: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """`p_i = max(q_i, 0) / Σ_j max(q_j, 0)` (Li et al., ICML 2022): a drop-in for `F.softmax`.

    0-homogeneous: `p(c q) = p(q)` for every c > 0, as nothing is added to the denominator. Unlike a softmax
    it does not ignore a shift: a bias on the scores, or a cap, changes what is positive.

    Keys that a mask hides get weight 0: those whose score is -inf, at most -9.9e8 (so that -1e9 hides), or at
    most half of the dtype's lowest value. A finite mask value above that, such as -1e4 or -1e5, is a score
    and does not hide: its key gets 0 beside a positive score, as every negative score does, but its equal
    share in a row without one. Three kinds of rows need a definition:

    - a row without a positive visible score is uniform over its visible keys. It stays a distribution, and
      the function 0-homogeneous; no gradient reaches its scores, as none does where a ReLU is 0;
    - a row whose keys are all hidden is 0 (a softmax gives NaN for -inf);
    - a row with a NaN or +inf among its scores is NaN, as a softmax's is.

    Sums are taken in float32 for float16 and bfloat16, after a division by the row's largest score: they do
    not overflow, however large the scores are. It is plain PyTorch: `torch.compile(fullgraph=True)`,
    double backward and `torch.func` work, and hand-written attention that calls it is measured like any
    other; the table of heads calls it "relu".

    Args:
        scores: floating, any shape, such as `[B, H, Tq, Tk]`: scaled and masked, as they would enter a
            softmax.
        dim: the dimension of the keys.
        dtype: if given, what is computed in and returned. Which keys are hidden is told in the scores' own.
            Integer scores need it, as in `F.softmax`.

    Returns:
        Of the scores' shape, in `dtype` or the scores' dtype; sums to one along `dim`.

    Raises:
        ConfigurationError: if the scores are no tensor of real numbers, or the dtype computed in is not
            floating.
    """
    if not isinstance(scores, Tensor) or scores.is_complex() or scores.dtype == torch.bool:
        what = f"a tensor of {scores.dtype}" if isinstance(scores, Tensor) else type(scores).__name__
        raise ConfigurationError(
            f"scale_invariant_attention: scores must be a tensor of real numbers, got {what}"
        )
    result = scores.dtype if dtype is None else dtype
    if not result.is_floating_point:
        raise ConfigurationError(
            f"scale_invariant_attention: scores must be floating, got {scores.dtype}"
            + ("" if dtype is None else f" and dtype={dtype}")
            + "; pass dtype=torch.float32"
        )
    if scores.dim() == 0:
        return scale_invariant_attention(scores[None], 0 if dim in (0, -1) else dim, dtype)[0]
    if not scores.shape[dim]:
        return scores.to(result)  # no key, and no largest score
    working = torch.float32 if result.itemsize < 4 else result
    # In the scores' own dtype: only that tells which of them a mask hides, also to whoever measures this.
    positive = F.relu(scores).to(working)
    lowest = max(_HIDDEN, torch.finfo(scores.dtype).min / 2) if scores.dtype.is_floating_point else _HIDDEN
    visible = (scores > lowest).to(working)
    # The largest score cancels, so that what it depends on need not be differentiated.
    largest = positive.detach().amax(dim, keepdim=True)
    empty = largest == 0
    positive = positive / largest.masked_fill(empty, 1.0)
    total = positive.sum(dim, keepdim=True)
    share = empty / visible.sum(dim, keepdim=True).clamp(min=1)
    # An empty row is divided by 1 and added to, rather than chosen by `where`: backward keeps two tensors
    # of the scores' size, and compiled code shows how the weights were made of the scores.
    weights = positive / total.masked_fill(empty, 1.0)
    return torch.addcmul(weights, visible, share).to(result)
