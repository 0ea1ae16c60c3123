"""The Triton programs: one for each pass over memory, and what they share.

Where Triton is not installed this file can be imported all the same; ``HAS_TRITON`` tells.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

HAS_TRITON = find_spec("triton") is not None
# Triton reads this variable when it is imported: kernels then run on CPU tensors, in Python.
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
if HAS_TRITON:
    import triton
    import triton.language as tl

    _WIDEN = tl.constexpr(INTERPRETED)
else:
    triton = tl = None

__all__ = [
    "HAS_TRITON",
    "INTERPRETED",
    "cross_kernel",
    "down_kernel",
    "joint_kernel",
    "linear_kernel",
    "sum_kernel",
    "up_kernel",
]


def _jit(function: Callable[..., None]) -> Any:
    return function if triton is None else triton.jit(function, do_not_specialize=["T", "threshold", "chunk"])


@_jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    """Return ``total + a·b``, float32; the interpreter would multiply the bits of bfloat16 (triton issue 11584)."""
    if _WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@_jit
def _keep(seed, rows, first, threshold, COLUMNS: tl.constexpr):
    """Draw the mask of one tile, whose first column is a multiple of 8; ``(rows, COLUMNS)`` booleans."""
    groups = first // 8 + tl.arange(0, COLUMNS // 8)
    row = (rows[:, None] + tl.zeros_like(groups)[None, :]).to(tl.uint32)
    group = (tl.zeros_like(rows)[:, None] + groups[None, :]).to(tl.uint32)
    zero = row * 0
    a, b, c, d = tl.philox(tl.load(seed), row, group, zero, zero, n_rounds=7)
    # Columns 0 to 7 of a group take the halves a, a', b, b', c, c', d, d'.
    even = tl.interleave(tl.interleave(a & 0xFFFF, c & 0xFFFF), tl.interleave(b & 0xFFFF, d & 0xFFFF))
    odd = tl.interleave(tl.interleave(a >> 16, c >> 16), tl.interleave(b >> 16, d >> 16))
    return tl.interleave(even, odd).to(tl.int32) >= threshold


@_jit
def down_kernel(
    x, factor, seed, out, T, N, r, x_t, x_n, f_r, f_n, scale, threshold, chunk, bucket,
    DROPOUT: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``out[split, t, :] = scale · Σ_n (k⊙x)[t, n] · factor[:, n]`` over one chunk of n."""
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    split = tl.program_id(1)
    ranks = tl.arange(0, R)
    last = tl.minimum(split * chunk + chunk, N)
    total = tl.zeros((BT, R), dtype=tl.float32)
    for first in range(split * chunk, last, BN):
        columns = first + tl.arange(0, BN)
        inside = columns < last
        tile = tl.load(
            x + rows.to(tl.int64)[:, None] * x_t + columns.to(tl.int64)[None, :] * x_n,
            mask=(rows < T)[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        if DROPOUT:
            tile = tl.where(_keep(seed, rows, first, threshold, BN), tile, 0.0).to(tile.dtype)
        other = tl.load(
            factor + ranks[None, :] * f_r + columns.to(tl.int64)[:, None] * f_n,
            mask=(ranks < r)[None, :] & inside[:, None], other=0.0,
        ).to(tile.dtype)  # fmt: skip
        total = _dot(tile, other, total, PRECISION)
    at = out + (split.to(tl.int64) * T + rows)[:, None] * r + ranks[None, :]
    tl.store(at, (total * scale).to(out.dtype.element_ty), mask=(rows < T)[:, None] & (ranks < r)[None, :])


@_jit
def up_kernel(
    out, H, factor, seed, T, N, r, o_t, o_n, f_r, f_n, scale, threshold, bucket,
    ACCUMULATE: tl.constexpr, DROPOUT: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``out[t, n] (+)= k ⊙ Σ_r H[t, r] · (scale · factor[r, n])``."""
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    first = tl.program_id(1) * BN
    columns = first + tl.arange(0, BN)
    ranks = tl.arange(0, R)
    inside = (rows < T)[:, None] & (columns < N)[None, :]
    h = tl.load(
        H + rows.to(tl.int64)[:, None] * r + ranks[None, :],
        mask=(rows < T)[:, None] & (ranks < r)[None, :], other=0.0,
    )  # fmt: skip
    other = tl.load(
        factor + ranks[:, None] * f_r + columns.to(tl.int64)[None, :] * f_n,
        mask=(ranks < r)[:, None] & (columns < N)[None, :], other=0.0,
    )  # fmt: skip
    zero = tl.zeros((BT, BN), dtype=tl.float32)
    total = _dot(h, (other.to(tl.float32) * scale).to(h.dtype), zero, PRECISION)
    if DROPOUT:
        total = tl.where(_keep(seed, rows, first, threshold, BN), total, 0.0)
    at = out + rows.to(tl.int64)[:, None] * o_t + columns.to(tl.int64)[None, :] * o_n
    if ACCUMULATE:
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, total.to(out.dtype.element_ty), mask=inside)


@_jit
def linear_kernel(
    out, x, weight, bias, H, factor, seed, T, N, K, r, x_t, x_k, w_k, w_n, f_r, f_n, scale, threshold, bucket,
    DROPOUT: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``out = x·weight + bias + k⊙(H·(scale·factor))``: the update is one more block of the inner dimension."""
    # Programs that share columns run close together, so that their weights stay in L2.
    program = tl.program_id(0)
    across, down = tl.cdiv(N, BN), tl.cdiv(T, BT)
    group = program // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    rows = (group * GROUP + (program % (GROUP * across)) % height) * BT + tl.arange(0, BT)
    first = ((program % (GROUP * across)) // height) * BN
    columns = first + tl.arange(0, BN)
    ranks = tl.arange(0, R)
    h = tl.load(
        H + rows.to(tl.int64)[:, None] * r + ranks[None, :],
        mask=(rows < T)[:, None] & (ranks < r)[None, :], other=0.0,
    )  # fmt: skip
    other = tl.load(
        factor + ranks[:, None] * f_r + columns.to(tl.int64)[None, :] * f_n,
        mask=(ranks < r)[:, None] & (columns < N)[None, :], other=0.0,
    )  # fmt: skip
    zero = tl.zeros((BT, BN), dtype=tl.float32)
    total = _dot(h, (other.to(tl.float32) * scale).to(h.dtype), zero, PRECISION)
    if DROPOUT:
        total = tl.where(_keep(seed, rows, first, threshold, BN), total, 0.0)
    if bias is not None:
        total += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    inner = tl.arange(0, BK)
    x_at = x + rows.to(tl.int64)[:, None] * x_t + inner.to(tl.int64)[None, :] * x_k
    w_at = weight + inner.to(tl.int64)[:, None] * w_k + columns.to(tl.int64)[None, :] * w_n
    for start in range(0, K, BK):
        a = tl.load(x_at, mask=(rows < T)[:, None] & (inner < K - start)[None, :], other=0.0)
        w = tl.load(w_at, mask=(inner < K - start)[:, None] & (columns < N)[None, :], other=0.0)
        total = _dot(a, w, total, PRECISION)
        x_at += BK * x_k
        w_at += BK * w_k
    at = out + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(rows < T)[:, None] & (columns < N)[None, :])


@_jit
def cross_kernel(
    x, H, seed, out, T, N, r, x_t, x_n, o_s, o_r, o_n, threshold, chunk, bucket,
    DROPOUT: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``out[split, :, n] = Σ_t (k⊙x)[t, n] · H[t, :]`` over one chunk of tokens."""
    first = tl.program_id(0) * BN
    columns = first + tl.arange(0, BN)
    split = tl.program_id(1)
    ranks = tl.arange(0, R)
    last = tl.minimum(split * chunk + chunk, T)
    total = tl.zeros((BN, R), dtype=tl.float32)
    for start in range(split * chunk, last, BT):
        rows = start + tl.arange(0, BT)
        tile = tl.load(
            x + rows.to(tl.int64)[:, None] * x_t + columns.to(tl.int64)[None, :] * x_n,
            mask=(rows < last)[:, None] & (columns < N)[None, :], other=0.0,
        )  # fmt: skip
        if DROPOUT:
            tile = tl.where(_keep(seed, rows, first, threshold, BN), tile, 0.0).to(tile.dtype)
        h = tl.load(
            H + rows.to(tl.int64)[:, None] * r + ranks[None, :],
            mask=(rows < last)[:, None] & (ranks < r)[None, :], other=0.0,
        )  # fmt: skip
        total = _dot(tl.trans(tile), h, total, PRECISION)
    at = out + split.to(tl.int64) * o_s + ranks[None, :] * o_r + columns.to(tl.int64)[:, None] * o_n
    tl.store(at, total, mask=(columns < N)[:, None] & (ranks < r)[None, :])


@_jit
def joint_kernel(
    G, factor, H, out_down, out_cross, T, N, r, g_t, g_n, f_r, f_n, chunk, bucket,
    R: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """One read of G: ``out_down[block of n, t, :]`` and ``out_cross[split, n, :]``, both parts of sums."""
    block, split = tl.program_id(0), tl.program_id(1)
    columns = block * BN + tl.arange(0, BN)
    ranks = tl.arange(0, R)
    last = tl.minimum(split * chunk + chunk, T)
    other = tl.load(
        factor + ranks[None, :] * f_r + columns.to(tl.int64)[:, None] * f_n,
        mask=(ranks < r)[None, :] & (columns < N)[:, None], other=0.0,
    ).to(H.dtype.element_ty)  # fmt: skip
    total = tl.zeros((BN, R), dtype=tl.float32)
    for start in range(split * chunk, last, BT):
        rows = start + tl.arange(0, BT)
        both = (rows < last)[:, None] & (ranks < r)[None, :]
        tile = tl.load(
            G + rows.to(tl.int64)[:, None] * g_t + columns.to(tl.int64)[None, :] * g_n,
            mask=(rows < last)[:, None] & (columns < N)[None, :], other=0.0,
        )  # fmt: skip
        h = tl.load(H + rows.to(tl.int64)[:, None] * r + ranks[None, :], mask=both, other=0.0)
        part = _dot(tile, other, tl.zeros((BT, R), dtype=tl.float32), PRECISION)
        tl.store(out_down + (block.to(tl.int64) * T + rows)[:, None] * r + ranks[None, :], part, mask=both)
        total = _dot(tl.trans(tile), h, total, PRECISION)
    at = out_cross + (split.to(tl.int64) * N + columns)[:, None] * r + ranks[None, :]
    tl.store(at, total, mask=(columns < N)[:, None] & (ranks < r)[None, :])


@_jit
def sum_kernel(parts, out, splits, size, scale, bucket, BLOCK: tl.constexpr):
    """``out = scale · Σ_split parts[split]``, in order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    part = parts + at
    for _ in range(splits):
        total += tl.load(part, mask=at < size, other=0.0)
        part += size
    tl.store(out + at, (total * scale).to(out.dtype.element_ty), mask=at < size)
