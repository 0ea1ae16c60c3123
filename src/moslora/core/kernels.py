"""The update on a GPU, in Triton: few passes over memory, dropout inside, the same bits on each run.

With A' = M·A composed before, k the dropout mask, c = 1/(1 - p) and s = alpha / r:

    H  = m·(k⊙x)·A'ᵀ          y   = x·Wᵀ + b + 2ᵉ·H·Bᵀ         s·c = m·2ᵉ, e ≥ 0
    D  = s·c·G·B              dB  = 2ᵉ·Gᵀ·H
    dA' = Dᵀ·(k⊙x)            dx  = G·W + k⊙(D·A')

H and D are ``(tokens, r)`` and carry the scales, so no tile is multiplied by them: m and s·c are applied to float32
sums before they are rounded, and a power of two rounds nothing. H never exceeds what it is without a scale.

Passes over memory (T tokens): x once for H; the output once more, or not at all where base product and update are one
kernel; G once for D and dB together (up to r = 32; twice above); x once for dA'; dx as the output. A mixer, a scale
and dropout add none. ``docs/performance.md`` counts the bytes.

Dropout keeps ``x[t, i]`` where 16 bits drawn for (seed, t, i) are at least ``n = round(65536·p)``, and rescales by
exactly ``65536 / (65536 - n)``; n is at least 1 where p > 0. The bits are Philox4x32 with 7 rounds (Salmon et al.,
SC 2011, doi:10.1145/2063384.2063405: the fewest that pass BigCrush), one call for 8 columns, so they depend on no tile
size, and nothing is stored for backward.

Sums are in float32 and in a fixed order, without atomics: the same device, configuration and input give the same bits.
Configurations are timed at the first call of a size and may differ between processes; under
``torch.use_deterministic_algorithms`` and in CUDA graph capture they are taken from a table in place of being timed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

# Read by Triton when it is imported: kernels then run on CPU tensors, in Python.
INTERPRETED = find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"
if find_spec("triton") is not None:
    import triton
    import triton.language as tl

    _WIDEN = tl.constexpr(INTERPRETED)
else:
    triton = tl = None

__all__ = ["MAX_RANK", "accumulate", "backward", "dropout_probability", "forward", "is_available"]

MAX_RANK = 256  # one tile holds all ranks
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LEVELS = 65536
LARGEST_BLOCK = 256  # chunks of a split sum are multiples of it
JOINT_RANK = 32  # above it the partial sums of the joint kernel cost more than reading G again
SHARED_BYTES = 96 * 1024  # what consumer GPUs have, too


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
def _down_kernel(
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
def _up_kernel(
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
def _linear_kernel(
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
def _cross_kernel(
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
def _joint_kernel(
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
def _sum_kernel(parts, out, splits, size, scale, bucket, BLOCK: tl.constexpr):
    """``out = scale · Σ_split parts[split]``, in order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    part = parts + at
    for _ in range(splits):
        total += tl.load(part, mask=at < size, other=0.0)
        part += size
    tl.store(out + at, (total * scale).to(out.dtype.element_ty), mask=at < size)


@dataclass(frozen=True)
class _Kernel:
    """A kernel, the configurations it may run in, best guess first, and what it takes of shared memory."""

    function: Any
    names: tuple[str, ...]
    configs: tuple[tuple[int, ...], ...]  # block sizes as named, then warps, then pipeline stages
    shared: Callable[..., int] = lambda **_: 0  # in elements
    key: tuple[str, ...] = ("bucket", "N", "R", "DROPOUT")
    restore: tuple[str, ...] = ()
    tuned: dict[int, Any] = field(default_factory=dict)

    def fitting(self, R: int, itemsize: int) -> list[tuple[dict[str, int], int, int]]:
        """Return block sizes, warps and stages of each configuration that fits every GPU's shared memory."""
        found = []
        for *sizes, warps, stages in self.configs:
            blocks = dict(zip(self.names, sizes, strict=True))
            if self.shared(R=R, stages=stages, **blocks) * itemsize <= SHARED_BYTES:
                found.append((blocks, warps, stages))
        return found

    def timed(self) -> Any:
        """Return the kernel with Triton's own choice among all configurations, made when first asked for."""
        if 0 not in self.tuned:
            configs = [
                triton.Config(dict(zip(self.names, sizes, strict=True)), num_warps=warps, num_stages=stages)
                for *sizes, warps, stages in self.configs
            ]
            self.tuned[0] = triton.autotune(
                configs, key=list(self.key), restore_value=list(self.restore) or None, do_bench=_bench
            )(self.function)  # fmt: skip
        return self.tuned[0]


def _bench(call: Callable[[], Any], quantiles: Any) -> Any:
    return triton.testing.do_bench(call, warmup=5, rep=20, quantiles=quantiles)


_TILES = ("BT", "BN")
_KERNELS = {
    "down": _Kernel(
        _down_kernel, _TILES,
        ((64, 128, 4, 3), (32, 128, 4, 4), (64, 64, 4, 4), (128, 64, 8, 4), (32, 64, 4, 3), (16, 32, 4, 2)),
        lambda BT, BN, R, stages: (BT + R) * BN * stages,
    ),
    "up": _Kernel(
        _up_kernel, _TILES,
        ((64, 128, 4, 1), (128, 128, 8, 1), (64, 256, 8, 1), (32, 128, 4, 1), (32, 64, 4, 1), (16, 32, 4, 1)),
        lambda BT, BN, R, stages: (BT + BN) * R + BT * BN * 2,
        restore=("out",),  # it accumulates in place, and timing repeats it
    ),
    "linear": _Kernel(
        _linear_kernel, ("BT", "BN", "BK", "GROUP"),
        ((128, 256, 64, 8, 8, 3), (128, 256, 64, 8, 8, 4), (128, 128, 64, 8, 4, 4), (128, 128, 64, 8, 8, 3),
         (64, 256, 64, 8, 8, 3), (64, 128, 64, 8, 4, 3), (64, 64, 32, 8, 4, 3), (32, 32, 32, 8, 4, 2)),
        lambda BT, BN, BK, GROUP, R, stages: (BT + BN) * max(BK * stages, R),
        key=("bucket", "N", "K", "R", "DROPOUT"),
    ),
    "cross": _Kernel(
        _cross_kernel, _TILES,
        ((64, 128, 4, 3), (32, 128, 4, 4), (64, 64, 4, 4), (128, 64, 8, 3), (32, 64, 4, 3), (16, 32, 4, 2)),
        lambda BT, BN, R, stages: BT * (BN + R) * stages,
    ),
    "joint": _Kernel(
        _joint_kernel, ("BT",),
        ((64, 8, 2), (32, 8, 3), (64, 8, 3), (32, 4, 2), (16, 4, 2)),
        lambda BT, R, stages: BT * (256 + R) * stages + 256 * R,
        key=("bucket", "N", "R"),
    ),
    "sum": _Kernel(_sum_kernel, ("BLOCK",), ((512, 4, 1),)),
}  # fmt: skip


def _may_time() -> bool:
    return not (
        INTERPRETED
        or torch.are_deterministic_algorithms_enabled()
        or torch.compiler.is_compiling()
        or torch.cuda.is_current_stream_capturing()
    )


def _launch(
    name: str, grid: Callable[[dict[str, int]], tuple[int, ...]], itemsize: int, **arguments: Any
) -> None:
    """Run one kernel; every launch goes through here."""
    kernel = _KERNELS[name]
    if len(kernel.configs) > 1 and _may_time():
        kernel.timed()[grid](**arguments, enable_fp_fusion=True)  # Triton 3.10 changes the default
        return
    blocks, warps, stages = kernel.fitting(arguments.get("R", 16), itemsize)[-1 if INTERPRETED else 0]
    kernel.function[grid(blocks)](
        **arguments, **blocks, num_warps=warps, num_stages=stages, enable_fp_fusion=True
    )


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _padded(r: int) -> int:
    return max(16, 1 << (r - 1).bit_length())  # the matrix units take 16 at least


def _bucket(T: int) -> int:
    return 1 << (T - 1).bit_length()  # a new length does not time everything again


def _precision(dtype: torch.dtype) -> str:
    if dtype != torch.float32:
        return "ieee"  # what low precision ignores
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 8


def _chunk(length: int, blocks: int, x: Tensor, least: int) -> int:
    """Split ``length`` so that ``blocks`` programs times the splits fill the device twice, ``least`` to a split."""
    least = LARGEST_BLOCK if INTERPRETED else least
    splits = max(1, min(2 * _processors(x) // max(blocks, 1), _cdiv(length, least)))
    return _cdiv(_cdiv(length, splits), LARGEST_BLOCK) * LARGEST_BLOCK


def _sum(parts: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    _launch(
        "sum", lambda meta: (_cdiv(out.numel(), meta["BLOCK"]),), 4,
        parts=parts, out=out, splits=parts.shape[0], size=out.numel(), scale=scale, bucket=1,
    )  # fmt: skip
    return out


@dataclass(frozen=True)
class _Dropout:
    threshold: int
    seed: Tensor | None

    @property
    def arguments(self) -> dict[str, Any]:
        return {"seed": self.seed, "threshold": self.threshold, "DROPOUT": self.threshold > 0}


_NO_DROPOUT = _Dropout(0, None)


def _levels(p: float) -> int:
    if not 0 <= p < 1:
        raise ValueError(
            f"dropout_p={p!r} is no probability to drop with; it must be at least 0 and below 1."
        )
    return min(max(round(p * LEVELS), 1), LEVELS - 1) if p > 0 else 0


def dropout_probability(p: float) -> float:
    """Return the probability with which the kernels drop when asked for ``p``.

    Args:
        p: At least 0, below 1.

    Returns:
        The multiple of 1/65536 nearest to ``p``, at least 1/65536 where ``p > 0``, and below 1.

    Raises:
        ValueError: If ``p`` is out of range.
    """
    return _levels(p) / LEVELS


def _dropout(p: float, seed: Tensor | int | None, device: torch.device) -> tuple[_Dropout, float]:
    """Return what the kernels need to draw masks, and the factor that keeps the mean."""
    levels = _levels(p)
    if levels == 0:
        return _NO_DROPOUT, 1.0
    if seed is None:
        raise ValueError(f"dropout_p={p!r} needs a seed; give an int, or an int64 tensor of one element.")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
            raise ValueError(
                f"seed must be one int64 on {device}; found {tuple(seed.shape)}, {seed.dtype}, {seed.device}."
            )
    else:
        seed = torch.full((1,), seed, dtype=torch.int64, device=device)
    return _Dropout(levels, seed), LEVELS / (LEVELS - levels)


def _split_scale(scale: float) -> tuple[float, float]:
    mantissa, exponent = math.frexp(scale)
    return (mantissa, 2.0**exponent) if exponent > 0 else (scale, 1.0)


def is_available(x: Tensor, r: int = 1) -> bool:
    """Tell whether the kernels take ``x``.

    Args:
        x: Input, any shape.
        r: Rank of the update.

    Returns:
        Whether Triton is installed, ``x`` is on an NVIDIA GPU that Triton compiles for (or on the CPU, when Triton
        was imported with ``TRITON_INTERPRET=1``), bfloat16, float16 or float32, and ``1 <= r <= 256``.
    """
    if triton is None or x.dtype not in DTYPES or not 1 <= r <= MAX_RANK:
        return False
    if INTERPRETED:
        return x.device.type == "cpu"
    if x.device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(x.device) >= (8, 0)


def _check(x: Tensor, composed: Tensor, B: Tensor, **others: tuple[Tensor | None, tuple[int, ...]]) -> None:
    if triton is None:
        raise RuntimeError(
            "moslora.core.kernels needs Triton, which is not installed; pip install triton, or use moslora.core.ops."
        )
    if x.ndim != 2 or composed.ndim != 2 or B.ndim != 2:
        raise ValueError(
            "expected x (T, in), composed (r, in) and B (out, r); "
            f"found {tuple(x.shape)}, {tuple(composed.shape)} and {tuple(B.shape)}."
        )
    r = composed.shape[0]
    if not is_available(x, r):
        raise RuntimeError(
            f"moslora.core.kernels takes bfloat16, float16 or float32 on a CUDA device of compute capability 8.0 or "
            f"later, and ranks 1 to {MAX_RANK}; found {x.dtype} on {x.device}, rank {r}. Use moslora.core.ops for it."
        )
    others |= {"composed": (composed, (r, x.shape[1])), "B": (B, (B.shape[0], r))}
    for name, (tensor, shape) in others.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; beside x {tuple(x.shape)} it must be {shape}."
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}; put both on one device.")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}; the kernels take {', '.join(map(str, DTYPES))}.")
        if name in ("weight", "G", "H") and tensor.dtype != x.dtype:
            raise ValueError(f"{name} is {tensor.dtype} and x {x.dtype}; cast both to one dtype.")


def _down(x: Tensor, factor: Tensor, scale: float, dropout: _Dropout) -> Tensor:
    """Return ``scale · (k⊙x)·factorᵀ``, ``(T, r)``, for x ``(T, n)`` and factor ``(r, n)``."""
    (T, N), r = x.shape, factor.shape[0]
    chunk = _chunk(N, _cdiv(T, 64), x, 512)
    splits = _cdiv(N, chunk)
    out = x.new_empty(splits, T, r, dtype=x.dtype if splits == 1 else torch.float32)
    _launch(
        "down", lambda meta: (_cdiv(T, meta["BT"]), splits), x.element_size(),
        x=x, factor=factor, out=out, T=T, N=N, r=r, x_t=x.stride(0), x_n=x.stride(1),
        f_r=factor.stride(0), f_n=factor.stride(1), scale=scale if splits == 1 else 1.0, chunk=chunk,
        bucket=_bucket(T), R=_padded(r), PRECISION=_precision(x.dtype), **dropout.arguments,
    )  # fmt: skip
    return out[0] if splits == 1 else _sum(out, scale, x.dtype)


def _up(out: Tensor, H: Tensor, factor: Tensor, scale: float, dropout: _Dropout, into: bool) -> None:
    """Set or (``into``) add ``k⊙(H·(scale·factor))`` to out ``(T, n)``, for H ``(T, r)`` and factor ``(r, n)``."""
    (T, N), r = out.shape, factor.shape[0]
    _launch(
        "up", lambda meta: (_cdiv(T, meta["BT"]), _cdiv(N, meta["BN"])), H.element_size(),
        out=out, H=H, factor=factor, T=T, N=N, r=r, o_t=out.stride(0), o_n=out.stride(1),
        f_r=factor.stride(0), f_n=factor.stride(1), scale=scale, bucket=_bucket(T),
        ACCUMULATE=into, R=_padded(r), PRECISION=_precision(H.dtype), **dropout.arguments,
    )  # fmt: skip


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, H: Tensor, factor: Tensor, scale: float, dropout: _Dropout
) -> Tensor:
    """Return ``x·weight + bias + k⊙(H·(scale·factor))`` for weight ``(k, n)`` and factor ``(r, n)``."""
    (T, K), N, r = x.shape, weight.shape[1], factor.shape[0]
    out = x.new_empty(T, N)
    _launch(
        "linear", lambda meta: (_cdiv(T, meta["BT"]) * _cdiv(N, meta["BN"]),), x.element_size(),
        out=out, x=x, weight=weight, bias=bias, H=H, factor=factor, T=T, N=N, K=K, r=r, x_t=x.stride(0),
        x_k=x.stride(1), w_k=weight.stride(0), w_n=weight.stride(1), f_r=factor.stride(0), f_n=factor.stride(1),
        scale=scale, bucket=_bucket(T), R=_padded(r), PRECISION=_precision(x.dtype), **dropout.arguments,
    )  # fmt: skip
    return out


def _cross(
    x: Tensor, H: Tensor, scale: float, dropout: _Dropout, dtype: torch.dtype, rank_first: bool
) -> Tensor:
    """Return ``scale · Hᵀ·(k⊙x)``, ``(r, n)`` if ``rank_first`` and otherwise ``(n, r)``."""
    (T, N), r = x.shape, H.shape[1]
    chunk = _chunk(T, _cdiv(N, 128), x, 512)
    splits = _cdiv(T, chunk)
    parts = x.new_empty(splits, *((r, N) if rank_first else (N, r)), dtype=torch.float32)
    _launch(
        "cross", lambda meta: (_cdiv(N, meta["BN"]), splits), x.element_size(),
        x=x, H=H, out=parts, T=T, N=N, r=r, x_t=x.stride(0), x_n=x.stride(1), o_s=parts.stride(0),
        o_r=parts.stride(1 if rank_first else 2), o_n=parts.stride(2 if rank_first else 1), chunk=chunk,
        bucket=_bucket(T), R=_padded(r), PRECISION=_precision(x.dtype), **dropout.arguments,
    )  # fmt: skip
    return _sum(parts, scale, dtype)


def _joint(G: Tensor, B: Tensor, H: Tensor, down_scale: float, cross_scale: float) -> tuple[Tensor, Tensor]:
    """Return D ``(T, r)`` and dB ``(out, r)`` from one read of G ``(T, out)``."""
    (T, N), r = G.shape, B.shape[1]
    block = 32 if INTERPRETED else 256 if G.element_size() == 2 else 128
    blocks = _cdiv(N, block)
    chunk = _chunk(T, blocks, G, 512)
    splits = _cdiv(T, chunk)
    down, cross = (G.new_empty(n, m, r, dtype=torch.float32) for n, m in ((blocks, T), (splits, N)))
    _launch(
        "joint", lambda meta: (blocks, splits), 2,
        G=G, factor=B, H=H, out_down=down, out_cross=cross, T=T, N=N, r=r, g_t=G.stride(0), g_n=G.stride(1),
        f_r=B.stride(1), f_n=B.stride(0), chunk=chunk, bucket=_bucket(T), R=_padded(r),
        PRECISION=_precision(G.dtype), BN=block,
    )  # fmt: skip
    return _sum(down, down_scale, G.dtype), _sum(cross, cross_scale, B.dtype)


_faster: dict[tuple[Any, ...], bool] = {}


def _is_fused_faster(key: tuple[Any, ...], fused: Callable[[], Any], separate: Callable[[], Any]) -> bool:
    """Time one kernel against the base's own product and a pass over its output, once per size."""
    if not _may_time():
        return False
    if key not in _faster:
        one, two = (
            triton.testing.do_bench(f, warmup=5, rep=20, return_mode="median") for f in (fused, separate)
        )
        _faster[key] = one < two
    return _faster[key]


def _choose(
    fused: bool | None, x: Tensor, key: tuple[Any, ...], one: Callable[[], Tensor], two: Callable[[], Tensor]
) -> Tensor:
    if fused is None:
        # Without tensor cores' low precision the library's product wins anyway.
        key = (*key, x.device, x.dtype, _bucket(x.shape[0]))
        fused = x.dtype != torch.float32 and _is_fused_faster(key, one, two)
    return one() if fused else two()


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    composed: Tensor,
    B: Tensor,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    *,
    fused: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a linear layer and its update.

    Args:
        x: Input, shape ``(T, in)``, bfloat16, float16 or float32, any strides.
        weight: The base layer's weight, shape ``(out, in)``, dtype of ``x``. None leaves the base product out.
        bias: The base layer's bias, shape ``(out,)``, or None; with a weight only.
        composed: ``M·A``, shape ``(r, in)``, any of the three dtypes; it is rounded to that of ``x`` as it is read.
        B: Shape ``(out, r)``, likewise.
        scale: ``alpha / r``, unitless.
        dropout_p: Probability of dropping an entry of ``x`` on its way to the update, see ``dropout_probability``.
        seed: Of the mask: an int, or one int64 on the device of ``x`` (which no graph or compiler bakes in).
        fused: Whether base product and update are one kernel. None: the faster of both, timed once per size.

    Returns:
        ``x Wᵀ + b + scale · drop(x) composedᵀ Bᵀ``, shape ``(T, out)``, contiguous, dtype of ``x``; and H,
        shape ``(T, r)``, as ``backward`` wants it: it carries a part of the scale.

    Raises:
        RuntimeError: If the kernels cannot take ``x`` or the rank, or Triton is not installed.
        ValueError: If shapes, dtypes or devices disagree, or the probability is none.
    """
    out_features = B.shape[0]
    _check(x, composed, B, weight=(weight, (out_features, x.shape[-1])), bias=(bias, (out_features,)))
    if weight is None and bias is not None:
        raise ValueError("a bias without a weight belongs to no base product; leave it to the base layer.")
    dropout, rescale = _dropout(dropout_p, seed, x.device)
    if x.shape[0] == 0:
        return x.new_empty(0, out_features), x.new_empty(0, composed.shape[0])
    down_scale, up_scale = _split_scale(scale * rescale)
    H = _down(x, composed, down_scale, dropout)
    if weight is None:
        out = x.new_empty(x.shape[0], out_features)
        _up(out, H, B.T, up_scale, _NO_DROPOUT, into=False)
        return out, H

    def separate() -> Tensor:
        out = torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
        _up(out, H, B.T, up_scale, _NO_DROPOUT, into=True)
        return out

    def one() -> Tensor:
        return _linear(x, weight.T, bias, H, B.T, up_scale, _NO_DROPOUT)

    return _choose(fused, x, ("forward", *weight.shape, composed.shape[0]), one, separate), H


def accumulate(
    out: Tensor,
    x: Tensor,
    composed: Tensor,
    B: Tensor,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
) -> Tensor:
    """Add the update to what a base layer of any kind (a quantised one) has made, in place.

    Args:
        out: The base layer's output, shape ``(T, out)``, any strides, and any of the three dtypes.
        x: Its input, shape ``(T, in)``.
        composed, B, scale, dropout_p, seed: As for ``forward``.

    Returns:
        H, shape ``(T, r)``, for ``backward`` with ``weight=None``.

    Raises:
        RuntimeError: If the kernels cannot take ``x`` or the rank, or Triton is not installed.
        ValueError: If shapes, dtypes or devices disagree, entries of ``out`` share memory, or the probability is none.
    """
    _check(x, composed, B, out=(out, (x.shape[0], B.shape[0])))
    if any(stride == 0 and size > 1 for stride, size in zip(out.stride(), out.shape, strict=True)):
        raise ValueError(f"out {tuple(out.shape)} is an expanded view, and cannot be added to; clone it.")
    dropout, rescale = _dropout(dropout_p, seed, x.device)
    if x.shape[0] == 0:
        return x.new_empty(0, composed.shape[0])
    down_scale, up_scale = _split_scale(scale * rescale)
    H = _down(x, composed, down_scale, dropout)
    _up(out, H, B.T, up_scale, _NO_DROPOUT, into=True)
    return H


def backward(
    G: Tensor,
    x: Tensor,
    weight: Tensor | None,
    composed: Tensor,
    B: Tensor,
    H: Tensor,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    need_x: bool = True,
    need_A: bool = True,
    need_B: bool = True,
    *,
    fused: bool | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Take the gradients of ``forward``, or of ``accumulate`` (``weight=None``: of the update alone).

    Args:
        G: Gradient of the output, shape ``(T, out)``, dtype of ``x``, any strides.
        x, weight, composed, B, scale, dropout_p, seed: As they were given to ``forward``; the same seed
            draws the same mask.
        H: What ``forward`` returned, shape ``(T, r)``.
        need_x, need_A, need_B: Which gradients are wanted.
        fused: As for ``forward``.

    Returns:
        ``dx``, shape ``(T, in)``, dtype of ``x``; the gradient of ``composed``, ``(r, in)``, in its dtype;
        ``dB``, ``(out, r)``, in that of B. None where it was not wanted.

    Raises:
        RuntimeError: If the kernels cannot take ``x`` or the rank, or Triton is not installed.
        ValueError: If shapes, dtypes or devices disagree, or the probability is none.
    """
    (T, n_in), (n_out, r) = x.shape, B.shape
    _check(x, composed, B, weight=(weight, (n_out, n_in)), G=(G, (T, n_out)), H=(H, (T, r)))
    dropout, rescale = _dropout(dropout_p, seed, x.device)
    if T == 0:
        wanted = ((need_x, x), (need_A, composed), (need_B, B))
        dx, dA, dB = (torch.zeros_like(t) if need else None for need, t in wanted)
        return dx, dA, dB
    H = H.contiguous()
    _, up_scale = _split_scale(scale * rescale)
    dx = dcomposed = dB = D = None
    if need_B and (need_x or need_A) and r <= JOINT_RANK:
        D, dB = _joint(G, B, H, scale * rescale, up_scale)  # (T, r), (out, r)
    else:
        if need_B:
            dB = _cross(G, H, up_scale, _NO_DROPOUT, B.dtype, rank_first=False)  # (out, r)
        if need_x or need_A:
            D = _down(G, B.T, scale * rescale, _NO_DROPOUT)  # (T, r)
    if D is None:
        return None, None, dB
    if need_A:
        dcomposed = _cross(x, D, 1.0, dropout, composed.dtype, rank_first=True)  # (r, in)
    if need_x and weight is None:
        dx = x.new_empty(T, n_in)
        _up(dx, D, composed, 1.0, dropout, into=False)  # (T, in)
    elif need_x and weight is not None:
        W = weight

        def separate() -> Tensor:
            dx = G @ W
            _up(dx, D, composed, 1.0, dropout, into=True)
            return dx

        def one() -> Tensor:
            return _linear(G, W, None, D, composed, 1.0, dropout)

        dx = _choose(fused, x, ("backward", *W.shape, r, dropout.threshold > 0), one, separate)  # (T, in)
    return dx, dcomposed, dB
