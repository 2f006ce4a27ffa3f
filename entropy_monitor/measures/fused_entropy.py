"""Entropy of all rows from one fused attention call, with memory linear in the number of tokens.

As `log A_ij = u_ij - lse_i`, `Ent_i = lse_i - Σ_j A_ij u_ij = lse_i - scale · q_i · o_i`, with
`o = attention(q, k, v := k)`: no logit leaves the kernel. The two terms cancel where entropy is small and
where logits are large, so some rows are computed again from their logits in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.measures import masks
from entropy_monitor.measures._blocks import blocks
from entropy_monitor.measures._logits import Modify, check_operands
from entropy_monitor.measures._precision import MAX_BYTES, exact, products_round, working_dtype
from entropy_monitor.measures.fused_norms import CHUNK, logit_norms
from entropy_monitor.measures.rows import RowStatistics, row_statistics

ROWS_AGAIN = 16
"""Rows of each head that an accelerator computes again: how many need it, the host must not wait to learn."""

_OPERATORS = {
    "cpu": "_scaled_dot_product_flash_attention_for_cpu",
    "cuda": "_scaled_dot_product_efficient_attention",
}
_LARGEST_GRID = 65535  # of CUDA, in the dimensions that batch and heads are laid out in
_ROUNDINGS = 4.0  # errors of the identity, in units of eps · the largest logit that a row could have
_ABSOLUTE = 1e-4  # nats of error from which on the CPU computes a row again
_RELATIVE = 1e-2
_SMALL = 1e-3  # nats, below which errors of a row no longer weigh more


def fused_available(device: torch.device) -> bool:
    """Whether PyTorch has an attention operator for the device that returns its log-sum-exp in float32.

    That of CUDA multiplies float32 by three TF32 products from compute capability 8.0 on, whatever the
    process's switches say, and in float32 below; on ROCm its precision is not known to us, and so it is not
    used.
    """
    name = _OPERATORS.get(device.type)
    if name is None or not hasattr(torch.ops.aten, name):
        return False
    return device.type == "cpu" or torch.version.hip is None


def supports_fused(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,  # noqa: ARG001  every question about a call is asked with the same arguments
    softcap: float | None = None,
    modify: Modify | None = None,
) -> bool:
    """Whether `fused_row_entropy` can read this call, without waiting for a device.

    Not with a soft-cap, modified logits or additive biases. Whether a floating mask holds biases is seen
    from its values: they are read on the CPU; on an accelerator, where that would wait, such masks are
    refused.
    """
    if softcap is not None or modify is not None or not fused_available(q.device) or q.device != k.device:
        return False
    if q.dim() != 4 or k.dim() != 4 or 0 in q.shape or 0 in k.shape:
        return False
    if q.device.type != "cpu" and (working_dtype(q, k) == torch.float64 or max(q.shape[:2]) > _LARGEST_GRID):
        return False
    if mask is None or mask.dtype == torch.bool:
        return True
    return mask.device.type == "cpu" and mask.is_floating_point() and _only_hides(mask)


@torch.no_grad()
def fused_row_entropy(
    q: Tensor,
    k: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    max_bytes: int = MAX_BYTES,
) -> RowStatistics:
    """Statistics of all rows from fused attention calls; arguments as in `row_statistics`.

    The identity errs by about 4 eps R nats, R = `|scale| ‖q_i‖ max_j ‖k_j - mean k‖`, the largest logit that
    the row could have: 5e-6 at R = 10, 5e-3 at R = 1e4. On the CPU, rows where that exceeds 1e-4 nats or 1 %
    of their entropy are computed again in float64. On an accelerator, where nothing may wait, the
    `ROWS_AGAIN` rows of each head that are worst by this measure are; the others keep the error above, and a
    key that is not finite makes NaN of rows of its head that do not see it. Unmeasured on a GPU.

    Args:
        q: `[B, H, Tq, D]`, any floating dtype; computed in float32 (float64 on the CPU for float64).
        k: `[B, Hk, Tk, D]`, Hk a divisor of H.
        mask: boolean (True = seen), or, on the CPU, additive with values that hide or are 0; broadcastable to
            `[B, H, Tq, Tk]`. A mask that differs between rows is copied in float32.
        is_causal: row i sees keys 0 … i.
        scale: factor of the product, `D**-0.5` by default.
        max_bytes: limit for temporaries; one head is never cut.

    Returns:
        RowStatistics of `[B, H, Tq]`. `entropy` lies in [0, log n]. `max_logit` is NaN: it is not known
        (-inf for fully masked rows). `logit_norm` is an upper bound within rounding, NaN where the mask
        depends on row or head and rows see a part of the keys. `bias_norm` is 0.

    Raises:
        ConfigurationError: if shapes or dtypes do not fit, or `supports_fused` says no.
    """
    check_operands(q, k, scale, None, None)
    B, H, Tq, D = q.shape
    Tk = k.shape[2]
    if mask is not None:
        mask = masks.as_four_dimensions(mask, (B, H, Tq, Tk))
    if not supports_fused(q, k, mask, is_causal):
        raise ConfigurationError(
            f"no fused reading of q {q.dtype} {tuple(q.shape)} on {q.device}, mask "
            f"{'none' if mask is None else mask.dtype}: the operator is not there, a size is 0, the dtype "
            f"is not the operator's, or the mask adds biases; use row_statistics"
        )
    seen = None if mask is None else ~masks.hidden(mask)
    dtype = working_dtype(q, k)
    scale = D**-0.5 if scale is None else scale
    chunks = -(-Tq // CHUNK)
    with exact(q.device):
        num_keys = _num_keys(seen, is_causal, Tq, Tk, q.device).to(dtype).expand(B, H, Tq)
        entropy, logit_norm = (
            torch.empty_like(num_keys, memory_format=torch.contiguous_format) for _ in range(2)
        )
        for b, h, _ in blocks(
            B,
            H,
            1,
            group=H // k.shape[1],
            row_bytes=dtype.itemsize * (Tq * (8 * D + 4 * CHUNK) + 10 * ROWS_AGAIN * Tk),
            head_bytes=dtype.itemsize * (8 * Tk * D + (4 * chunks * D * D if is_causal else 0)),
            max_bytes=max_bytes,
        ):
            group = H // k.shape[1]
            part = None if seen is None else masks.cut(seen, b, h, slice(None))
            keys = k[b, h.start // group : (h.stop - 1) // group + 1]
            entropy[b, h], logit_norm[b, h] = _heads(
                q[b, h], keys, part, is_causal, scale, num_keys[b, h], max_bytes
            )
    blind = num_keys == 0
    max_logit = torch.where(blind, -math.inf, torch.full_like(entropy, math.nan))
    return RowStatistics(entropy, num_keys.contiguous(), max_logit, logit_norm, torch.zeros_like(entropy))


def _heads(
    q: Tensor,
    k: Tensor,
    seen: Tensor | None,
    is_causal: bool,
    scale: float,
    num_keys: Tensor,
    max_bytes: int,
) -> tuple[Tensor, Tensor]:
    """Entropies and logit norms of a block: `[b, h, Tq]` each."""
    dtype = num_keys.dtype
    # Whole rows are blind or not: that is in num_keys, and the operator needs no mask for it.
    inner = None if seen is None or seen.shape[-1] != k.shape[2] else seen
    padding = inner[:, 0, 0, :, None] if inner is not None and inner.shape[1:3] == (1, 1) else None
    keys = _centred(k.to(dtype), None if padding is None else padding[:, None])
    rows = q.to(dtype) * scale  # the operators' own scale must be positive
    lse, out = _attention(rows, keys, inner, is_causal)
    entropy = lse - (rows * out).sum(-1)

    farthest = torch.linalg.vector_norm(keys, dim=-1).amax(-1).repeat_interleave(q.shape[1] // k.shape[1], 1)
    reach = torch.linalg.vector_norm(rows, dim=-1) * farthest[..., None]
    error = torch.where(num_keys > 1, _ROUNDINGS * torch.finfo(dtype).eps * reach, 0.0)
    # One key leaves nothing to attend to; times 0, since a logit that is not finite must still show.
    entropy = torch.where(num_keys > 0, torch.where(num_keys > 1, entropy, entropy * 0), 0.0)
    again = _again_where_needed if q.device.type == "cpu" else _again_the_worst
    again(entropy, error, q, k, seen, is_causal, scale, max_bytes)
    entropy = entropy.clamp(min=0).minimum(num_keys.clamp(min=1).log())

    if inner is not None and padding is None:
        norm = torch.where(num_keys > 1, torch.full_like(entropy, math.nan), 0.0)
    else:
        weights = None if padding is None else padding[..., 0][:, None].to(dtype)
        norm = logit_norms(rows, keys, weights, is_causal=is_causal)
        norm = torch.where(num_keys > 1, norm, 0.0)
    return entropy, norm


def _centred(keys: Tensor, seen: Tensor | None) -> Tensor:
    """Keys less their mean, which softmax ignores and costs float32 digits; 0 where hidden from all rows."""
    if seen is None:
        return keys - keys.mean(-2, keepdim=True)
    kept = torch.where(seen, keys, 0.0)
    mean = kept.sum(-2, keepdim=True) / seen.sum(-2, keepdim=True).clamp(min=1)
    return torch.where(seen, keys - mean, 0.0)


def _attention(rows: Tensor, keys: Tensor, seen: Tensor | None, is_causal: bool) -> tuple[Tensor, Tensor]:
    """Log-sum-exp `[b, h, Tq]` of `rows · keysᵀ`, and the mean of the keys under it, `[b, h, Tq, D]`."""
    b, h, Tq, D = rows.shape
    # Of strided features the operators would read others, without a word.
    rows, keys = rows.contiguous(), keys.contiguous()
    Tk, dtype = keys.shape[2], rows.dtype
    bias: Tensor | None = None
    if seen is not None:
        # The operator of CUDA wants rows of the mask aligned to 16 bytes.
        storage = torch.zeros(*seen.shape[:-1], -(-Tk // 16) * 16, dtype=rows.dtype, device=rows.device)
        bias = storage[..., :Tk].masked_fill_(~seen, -math.inf).expand(b, h, Tq, Tk)
    if rows.device.type == "cpu":
        if products_round():  # the operator follows that switch too, on CPUs with products of bfloat16
            rows, keys, bias = rows.double(), keys.double(), None if bias is None else bias.double()
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            rows, keys, keys, 0.0, is_causal, attn_mask=bias, scale=1.0
        )
        return lse.to(dtype), out.to(dtype)
    wide = (0, -D % 4)
    repeated = F.pad(keys, wide).repeat_interleave(h // keys.shape[1], 1)
    out, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
        F.pad(rows, wide), repeated, repeated, bias, True, 0.0, is_causal, scale=1.0
    )
    return lse[..., :Tq], out[..., :D]  # its log-sum-exp is padded to a multiple of 32 rows


def _again_where_needed(
    entropy: Tensor,
    error: Tensor,
    q: Tensor,
    k: Tensor,
    seen: Tensor | None,
    is_causal: bool,
    scale: float,
    max_bytes: int,
) -> None:
    """Compute rows again, in place, whose error may matter or whose entropy is not finite."""
    group = q.shape[1] // k.shape[1]
    needed = (error > _ABSOLUTE) | (error > _RELATIVE * entropy) | ~entropy.isfinite()
    for b, h in needed.any(-1).nonzero().tolist():
        rows = needed[b, h].nonzero()[:, 0]
        at, key_head = (slice(b, b + 1), slice(h, h + 1)), slice(h // group, h // group + 1)
        entropy[b, h, rows] = (
            row_statistics(
                q[at].double(),
                k[at[0], key_head].double(),
                mask=None if seen is None else masks.cut(seen, *at, slice(None)),
                is_causal=is_causal,
                scale=scale,
                rows=rows,
                max_bytes=max_bytes,
            )
            .entropy[0, 0]
            .to(entropy.dtype)
        )


def _again_the_worst(
    entropy: Tensor,
    error: Tensor,
    q: Tensor,
    k: Tensor,
    seen: Tensor | None,
    is_causal: bool,
    scale: float,
    max_bytes: int,  # noqa: ARG001  the number of rows is fixed, and counted where blocks are cut
) -> None:
    """Compute `ROWS_AGAIN` rows of each head again, in place: those whose relative error is largest."""
    b, h, Tq, D = q.shape
    Hk = k.shape[1]
    score = error / (entropy.clamp(min=0) + _SMALL)  # NaN counts as largest
    rows = score.topk(min(ROWS_AGAIN, Tq), dim=-1).indices
    chosen = q.gather(2, rows[..., None].expand(-1, -1, -1, D)).double()
    part = seen
    if seen is not None and seen.shape[2] > 1:
        whole = seen.expand(b, h, Tq, seen.shape[-1])
        part = whole.gather(2, rows[..., None].expand(-1, -1, -1, seen.shape[-1]))
    keys = k.double().repeat_interleave(h // Hk, 1) if Hk != h else k.double()
    entropy.scatter_(2, rows, _direct(chosen, keys, part, rows, is_causal, scale).to(entropy.dtype))


def _direct(
    q: Tensor, keys: Tensor, seen: Tensor | None, rows: Tensor, is_causal: bool, scale: float
) -> Tensor:
    """Entropies `[..., n]` of rows q `[..., n, D]` over keys `[..., Tk, D]`, from their logits.

    `rows` `[..., n]` are the rows' places in the sequence; `seen` broadcasts to `[..., n, Tk]`.
    """
    logits = (q @ keys.mT).mul_(scale)
    hidden: Tensor | None = None if seen is None else ~seen
    if is_causal:
        future = torch.arange(keys.shape[-2], device=q.device) > rows[..., None]
        hidden = future if hidden is None else hidden | future
    if hidden is not None:
        logits.masked_fill_(hidden, -math.inf)
    top, argmax = logits.max(-1, keepdim=True)
    below = logits.sub_(top)
    e = below.exp()
    if hidden is not None:
        below.masked_fill_(hidden, 0.0)
        e.masked_fill_(hidden, 0.0)
    weighted = (e * below).sum(-1)
    # Without the largest, whose 1 would round the others' digits away.
    rest = e.scatter_(-1, argmax, 0.0).sum(-1)
    found = rest.log1p() - weighted / (1 + rest)
    if hidden is not None:
        found = torch.where(hidden.all(-1), 0.0, found)
    return found


def _num_keys(seen: Tensor | None, is_causal: bool, Tq: int, Tk: int, device: torch.device) -> Tensor:
    """Visible keys of every row, broadcastable to `[B, H, Tq]`."""
    rows = torch.arange(1, Tq + 1, device=device)
    plain = rows.clamp(max=Tk) if is_causal else torch.full_like(rows, Tk)
    if seen is None:
        return plain
    if seen.shape[-1] == 1 and Tk != 1:
        return torch.where(seen[..., 0], plain, 0)
    if not is_causal:
        return seen.sum(-1)
    if seen.shape[2] == 1:
        counts = seen[:, :, 0].to(torch.int32).cumsum(-1)
        return counts.index_select(-1, plain - 1)
    return seen.tril().sum(-1)


def _only_hides(mask: Tensor) -> bool:
    return bool((masks.hidden(mask) | (mask == 0)).all())
