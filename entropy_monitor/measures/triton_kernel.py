"""The Triton kernel behind `triton_rows`; importing this module imports triton.

One program reads a tile of query rows of one head against all keys that they may see, and keeps of each row:
the largest logit m, `r = Σ e^(s-m) - 1` (the 1 of the largest kept apart, so that the rest keeps its digits),
`t = Σ e^(s-m) (s-m)`, and count, mean and centred squares of the logits, merged from tile to tile as Chan,
Golub & LeVeque (1983) merge variances. Nothing in it subtracts what is nearly equal.
"""

# Triton reads this source itself: no `from __future__ import annotations`, no helpers in plain Python.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"

import triton
import triton.language as tl


@triton.jit
def _log1p(x):
    # Below the switch, where 1 + x rounds the digits of x away, the series errs by 5e-9 of it.
    series = x * (1 - x * (0.5 - x * (1 / 3 - x * (0.25 - x * 0.2))))
    return tl.where(x < 0.03, series, tl.log(1 + x))


@triton.jit
def _bound(norm, n):
    """`B(norm, n)` as `measures.entropy_lower_bound` computes it, in nats."""
    others = tl.maximum(n - 1, 0.0)
    delta = norm * tl.sqrt(n / tl.maximum(others, 1.0))
    x = tl.exp(tl.log(tl.maximum(others, 1.0)) - delta)
    tail = tl.where(x > 0, delta * (x / (1 + x)), 0.0)
    bound = tl.where(n > 1, _log1p(x) + tail, 0.0)
    return tl.where(norm == norm, bound, norm)


@triton.jit
def _moments(values, seen, count):
    """Mean and centred squares of the values seen in each row of a tile."""
    mean = tl.sum(tl.where(seen, values, 0.0), 1) / tl.maximum(count, 1.0)
    centred = tl.where(seen, values - mean[:, None], 0.0)
    return mean, tl.sum(centred * centred, 1)


@triton.jit
def _merge(count, mean, squares, more, more_mean, more_squares):
    """Mean and centred squares of two sets together."""
    share = more / tl.maximum(count + more, 1.0)
    step = more_mean - mean
    return mean + share * step, squares + more_squares + step * step * (count * share)


@triton.jit
def _tile(
    state,
    q,
    k_base,
    k_stride_n,
    k_stride_d,
    mask_base,
    mask_stride_m,
    mask_stride_n,
    two_valued,
    rows,
    dims,
    start,
    Tq,
    Tk,
    scale,
    softcap,
    hiding,
    left,
    right,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHECK: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of keys added to the state of a tile of rows; `CHECK`: not every row sees every key of it."""
    m, r, t, count, mean, squares, bias_mean, bias_squares = state
    inner = tl.arange(0, BLOCK_N)
    columns = start + inner
    # Offsets within the tile fit 32 bits; those of tiles need not.
    k_place = (
        k_base
        + tl.cast(start, tl.int64) * k_stride_n
        + (inner[:, None] * k_stride_n + dims[None, :] * k_stride_d)
    )
    if CHECK:
        k = tl.load(k_place, mask=(columns < Tk)[:, None] & (dims < D)[None, :], other=0.0)
    elif BLOCK_D != D:
        k = tl.load(k_place, mask=(dims < D)[None, :], other=0.0)
    else:
        k = tl.load(k_place)
    if UPCAST:
        k = k.to(tl.float32)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if SOFTCAP:
        z = tl.exp(-2 * tl.abs(s) / softcap)
        s = tl.where(s < 0, -softcap, softcap) * ((1 - z) / (1 + z))
    if CHECK:
        exists = (rows < Tq)[:, None] & (columns < Tk)[None, :]
        seen = exists
        if LEFT:
            seen = seen & (columns[None, :] >= rows[:, None] - left)
        if RIGHT:
            seen = seen & (columns[None, :] <= rows[:, None] + right)
        if MASK != 0:
            mask_place = mask_base + tl.cast(start, tl.int64) * mask_stride_n
            mask_place += tl.arange(0, BLOCK_M)[:, None] * mask_stride_m + inner[None, :] * mask_stride_n
            given = tl.load(mask_place, mask=exists, other=0)
            if MASK == 1:
                seen = seen & (given != 0)
            else:
                bias = given.to(tl.float32)
                # -1e4 as bfloat16 rounds it: as in measures.masks.
                ten_thousand = (bias >= -10039.0625) & (bias <= -9960.9375) & (two_valued != 0)
                seen = seen & ((bias > hiding) | (bias != bias)) & (ten_thousand == 0)
                s += bias
        s = tl.where(seen, s, -float("inf"))
        more = tl.sum(seen.to(tl.float32), 1)
    else:
        seen = tl.full([BLOCK_M, BLOCK_N], 1, tl.int1)
        more = tl.full([BLOCK_M], BLOCK_N, tl.float32)
    top = tl.max(s, 1)
    # Without a key seen there is nothing to subtract.
    base = tl.where(top == -float("inf"), 0.0, top)
    below = s - base[:, None]
    e = tl.exp(below)
    is_top = below == 0
    rest = tl.sum(tl.where(is_top, 0.0, e), 1) + (tl.sum(is_top.to(tl.float32), 1) - 1)
    weighted = tl.sum(tl.where(seen, e * below, 0.0), 1)
    below_mean, more_squares = _moments(below, seen, more)
    mean, squares = _merge(count, mean, squares, more, base + below_mean, more_squares)
    if MASK == 2:
        more_bias, more_bias_squares = _moments(bias, seen, more)
        bias_mean, bias_squares = _merge(count, bias_mean, bias_squares, more, more_bias, more_bias_squares)

    largest = tl.maximum(m, top)
    fall = tl.where(m == -float("inf"), 0.0, m - largest)
    fall_of_tile = tl.where(top == -float("inf"), 0.0, top - largest)
    old = tl.exp(fall)
    new = tl.exp(fall_of_tile)
    # Of a set without keys r is -1, and its sum 1 + r is 0.
    t = old * (t + fall * (1 + r)) + new * (weighted + fall_of_tile * (1 + rest))
    r = tl.where(top > m, rest + old * (1 + r), r + new * (1 + rest))
    return largest, r, t, count + more, mean, squares, bias_mean, bias_squares


# Lengths are left general: a new one must not stop the training for a compilation.
@triton.jit(do_not_specialize=["H", "Tq", "Tk", "left", "right", "out_stride"])
def row_kernel(
    q_ptr,
    k_ptr,
    mask_ptr,
    two_valued_ptr,
    out_ptr,
    q_stride_b,
    q_stride_h,
    q_stride_m,
    q_stride_d,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    k_stride_d,
    mask_stride_b,
    mask_stride_h,
    mask_stride_m,
    mask_stride_n,
    out_stride,
    H,
    Tq,
    Tk,
    scale,
    softcap,
    hiding,
    left,
    right,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASK: tl.constexpr,
    UPCAST: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Reads one tile of query rows.

    `MASK`: 0 none, 1 boolean as bytes, 2 additive. `out_ptr`: float32 `[fields, B · H, tiles or Tq]`,
    `out_stride` between fields; for `SUMS` one value for each tile of rows.
    """
    tiles = tl.cdiv(Tq, BLOCK_M)
    program = tl.program_id(0)
    line = program // tiles
    # Under a causal mask the last rows see the most: they start first.
    tile = tiles - 1 - program % tiles
    b = (line // H).to(tl.int64)
    h = (line % H).to(tl.int64)
    first = tile * BLOCK_M
    last = tl.minimum(first + BLOCK_M, Tq) - 1
    rows = first + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    q_base = q_ptr + b * q_stride_b + h * q_stride_h + first.to(tl.int64) * q_stride_m
    q_place = q_base + (tl.arange(0, BLOCK_M)[:, None] * q_stride_m + dims[None, :] * q_stride_d)
    q = tl.load(q_place, mask=(rows < Tq)[:, None] & (dims < D)[None, :], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    k_base = k_ptr + b * k_stride_b + (h // GROUP) * k_stride_h
    mask_base = mask_ptr + b * mask_stride_b + h * mask_stride_h + first.to(tl.int64) * mask_stride_m
    two_valued = 0
    if MASK == 2:
        two_valued = tl.load(two_valued_ptr)

    # Keys from `low` to `high` are seen by some row, those from `all_low` to `all_high` by every row of the
    # tile.
    low = 0
    high = Tk
    all_low = 0
    all_high = Tk // BLOCK_N * BLOCK_N
    if LEFT:
        low = tl.maximum(first - left, 0) // BLOCK_N * BLOCK_N
        all_low = (tl.maximum(last - left, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    if RIGHT:
        high = tl.minimum(tl.maximum(last + right + 1, 0), Tk)
        all_high = tl.minimum(tl.maximum(first + right + 1, 0), Tk) // BLOCK_N * BLOCK_N
    if MASK != 0:
        all_low = high
    all_low = tl.minimum(tl.maximum(all_low, low), tl.maximum(high, low))
    all_high = tl.minimum(tl.maximum(all_high, all_low), tl.maximum(high, low))

    nothing = tl.zeros([BLOCK_M], dtype=tl.float32)
    state = (
        nothing - float("inf"),
        nothing - 1,
        nothing,
        nothing,
        nothing,
        nothing,
        nothing,
        nothing,
    )
    if LEFT or MASK != 0:
        for start in range(low, all_low, BLOCK_N):
            state = _tile(
                state, q, k_base, k_stride_n, k_stride_d, mask_base, mask_stride_m, mask_stride_n, two_valued,
                rows, dims, start, Tq, Tk, scale, softcap, hiding, left, right,
                D, BLOCK_D, BLOCK_M, BLOCK_N, True, LEFT, RIGHT, SOFTCAP, MASK, UPCAST,
            )  # fmt: skip
    if MASK == 0:
        for start in range(all_low, all_high, BLOCK_N):
            state = _tile(
                state, q, k_base, k_stride_n, k_stride_d, mask_base, mask_stride_m, mask_stride_n, two_valued,
                rows, dims, start, Tq, Tk, scale, softcap, hiding, left, right,
                D, BLOCK_D, BLOCK_M, BLOCK_N, False, LEFT, RIGHT, SOFTCAP, MASK, UPCAST,
            )  # fmt: skip
        for start in range(all_high, high, BLOCK_N):
            state = _tile(
                state, q, k_base, k_stride_n, k_stride_d, mask_base, mask_stride_m, mask_stride_n, two_valued,
                rows, dims, start, Tq, Tk, scale, softcap, hiding, left, right,
                D, BLOCK_D, BLOCK_M, BLOCK_N, True, LEFT, RIGHT, SOFTCAP, MASK, UPCAST,
            )  # fmt: skip

    m, r, t, count, mean, squares, _bias_mean, bias_squares = state
    entropy = tl.where(count > 0, _log1p(r) - t / (1 + r), 0.0)
    m = tl.where((mean != mean) & (m < float("inf")), mean, m)  # a maximum drops NaN
    norm = tl.sqrt(squares)
    if SUMS:
        valid = (count > 0) & (rows < Tq)
        raised = norm * (1 + 16 * 1.1920929e-07)
        out = out_ptr + line.to(tl.int64) * tiles + tile
        tl.store(out, tl.sum(valid.to(tl.float32)))
        tl.store(out + out_stride, tl.sum(tl.where(valid, entropy, 0.0)))
        tl.store(out + 2 * out_stride, tl.sum(tl.where(valid, tl.log(tl.maximum(count, 1.0)), 0.0)))
        top = tl.where(rows < Tq, m, -float("inf"))
        not_a_number = tl.sum((top != top).to(tl.float32)) > 0
        tl.store(out + 3 * out_stride, tl.where(not_a_number, float("nan"), tl.max(top)))
        tl.store(out + 4 * out_stride, tl.sum(tl.where(valid, _bound(raised, count), 0.0)))
    else:
        out = out_ptr + line.to(tl.int64) * Tq + rows
        inside = rows < Tq
        tl.store(out, entropy, mask=inside)
        tl.store(out + out_stride, count, mask=inside)
        tl.store(out + 2 * out_stride, m, mask=inside)
        tl.store(out + 3 * out_stride, norm, mask=inside)
        tl.store(out + 4 * out_stride, tl.sqrt(bias_squares), mask=inside)
        tl.store(out + 5 * out_stride, m + _log1p(r), mask=inside)
