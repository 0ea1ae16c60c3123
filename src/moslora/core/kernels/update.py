"""Forward and backward of the update, made of the Triton programs. The package's docstring has the equations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moslora.core.kernels import launching
from moslora.core.kernels.launching import (
    bucket_of,
    cdiv,
    chunk_of,
    is_fused_faster,
    padded,
    precision,
    sum_parts,
)
from moslora.core.kernels.programs import HAS_TRITON, INTERPRETED

__all__ = ["MAX_RANK", "accumulate", "backward", "dropout_probability", "forward", "is_available"]

MAX_RANK = 256  # one tile holds all ranks
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LEVELS = 65536
JOINT_RANK = 32  # above it the partial sums of the joint kernel cost more than reading G again


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
            f"dropout_p={p!r} is not a probability to drop with; it must be at least 0 and below 1."
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
    if not HAS_TRITON or x.dtype not in DTYPES or not 1 <= r <= MAX_RANK:
        return False
    if INTERPRETED:
        return x.device.type == "cpu"
    if x.device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(x.device) >= (8, 0)


def _check(x: Tensor, composed: Tensor, B: Tensor, **others: tuple[Tensor | None, tuple[int, ...]]) -> None:
    if not HAS_TRITON:
        raise RuntimeError(
            "The kernels need Triton, which is not installed. Run pip install triton, or use moslora.core.ops."
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
    chunk = chunk_of(N, cdiv(T, 64), x, 512)
    splits = cdiv(N, chunk)
    out = x.new_empty(splits, T, r, dtype=x.dtype if splits == 1 else torch.float32)
    launching.launch(
        "down", lambda meta: (cdiv(T, meta["BT"]), splits), x.element_size(),
        x=x, factor=factor, out=out, T=T, N=N, r=r, x_t=x.stride(0), x_n=x.stride(1),
        f_r=factor.stride(0), f_n=factor.stride(1), scale=scale if splits == 1 else 1.0, chunk=chunk,
        bucket=bucket_of(T), R=padded(r), PRECISION=precision(x.dtype), **dropout.arguments,
    )  # fmt: skip
    return out[0] if splits == 1 else sum_parts(out, scale, x.dtype)


def _up(out: Tensor, H: Tensor, factor: Tensor, scale: float, dropout: _Dropout, into: bool) -> None:
    """Set or (``into``) add ``k⊙(H·(scale·factor))`` to out ``(T, n)``, for H ``(T, r)`` and factor ``(r, n)``."""
    (T, N), r = out.shape, factor.shape[0]
    launching.launch(
        "up", lambda meta: (cdiv(T, meta["BT"]), cdiv(N, meta["BN"])), H.element_size(),
        out=out, H=H, factor=factor, T=T, N=N, r=r, o_t=out.stride(0), o_n=out.stride(1),
        f_r=factor.stride(0), f_n=factor.stride(1), scale=scale, bucket=bucket_of(T),
        ACCUMULATE=into, R=padded(r), PRECISION=precision(H.dtype), **dropout.arguments,
    )  # fmt: skip


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, H: Tensor, factor: Tensor, scale: float, dropout: _Dropout
) -> Tensor:
    """Return ``x·weight + bias + k⊙(H·(scale·factor))`` for weight ``(k, n)`` and factor ``(r, n)``."""
    (T, K), N, r = x.shape, weight.shape[1], factor.shape[0]
    out = x.new_empty(T, N)
    launching.launch(
        "linear", lambda meta: (cdiv(T, meta["BT"]) * cdiv(N, meta["BN"]),), x.element_size(),
        out=out, x=x, weight=weight, bias=bias, H=H, factor=factor, T=T, N=N, K=K, r=r, x_t=x.stride(0),
        x_k=x.stride(1), w_k=weight.stride(0), w_n=weight.stride(1), f_r=factor.stride(0), f_n=factor.stride(1),
        scale=scale, bucket=bucket_of(T), R=padded(r), PRECISION=precision(x.dtype), **dropout.arguments,
    )  # fmt: skip
    return out


def _cross(
    x: Tensor, H: Tensor, scale: float, dropout: _Dropout, dtype: torch.dtype, rank_first: bool
) -> Tensor:
    """Return ``scale · Hᵀ·(k⊙x)``, ``(r, n)`` if ``rank_first`` and otherwise ``(n, r)``."""
    (T, N), r = x.shape, H.shape[1]
    chunk = chunk_of(T, cdiv(N, 128), x, 512)
    splits = cdiv(T, chunk)
    parts = x.new_empty(splits, *((r, N) if rank_first else (N, r)), dtype=torch.float32)
    launching.launch(
        "cross", lambda meta: (cdiv(N, meta["BN"]), splits), x.element_size(),
        x=x, H=H, out=parts, T=T, N=N, r=r, x_t=x.stride(0), x_n=x.stride(1), o_s=parts.stride(0),
        o_r=parts.stride(1 if rank_first else 2), o_n=parts.stride(2 if rank_first else 1), chunk=chunk,
        bucket=bucket_of(T), R=padded(r), PRECISION=precision(x.dtype), **dropout.arguments,
    )  # fmt: skip
    return sum_parts(parts, scale, dtype)


def _joint(G: Tensor, B: Tensor, H: Tensor, down_scale: float, cross_scale: float) -> tuple[Tensor, Tensor]:
    """Return D ``(T, r)`` and dB ``(out, r)`` from one read of G ``(T, out)``."""
    (T, N), r = G.shape, B.shape[1]
    block = 32 if INTERPRETED else 256 if G.element_size() == 2 else 128
    blocks = cdiv(N, block)
    chunk = chunk_of(T, blocks, G, 512)
    splits = cdiv(T, chunk)
    down, cross = (G.new_empty(n, m, r, dtype=torch.float32) for n, m in ((blocks, T), (splits, N)))
    launching.launch(
        "joint", lambda meta: (blocks, splits), 2,
        G=G, factor=B, H=H, out_down=down, out_cross=cross, T=T, N=N, r=r, g_t=G.stride(0), g_n=G.stride(1),
        f_r=B.stride(1), f_n=B.stride(0), chunk=chunk, bucket=bucket_of(T), R=padded(r),
        PRECISION=precision(G.dtype), BN=block,
    )  # fmt: skip
    return sum_parts(down, down_scale, G.dtype), sum_parts(cross, cross_scale, B.dtype)


def _choose(
    fused: bool | None, x: Tensor, key: tuple[Any, ...], one: Callable[[], Tensor], two: Callable[[], Tensor]
) -> Tensor:
    if fused is None:
        # Without tensor cores' low precision the library's product wins anyway.
        key = (*key, x.device, x.dtype, bucket_of(x.shape[0]))
        fused = x.dtype != torch.float32 and is_fused_faster(key, one, two)
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
        ValueError: If shapes, dtypes or devices disagree, or the probability is out of range.
    """
    out_features = B.shape[0]
    _check(x, composed, B, weight=(weight, (out_features, x.shape[-1])), bias=(bias, (out_features,)))
    if weight is None and bias is not None:
        raise ValueError(
            "A bias without a weight does not belong to a base product; leave it to the base layer."
        )
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
    """Add the update to what a base layer of any kind (a quantized one) has made, in place.

    Args:
        out: The base layer's output, shape ``(T, out)``, any strides, and any of the three dtypes.
        x: Its input, shape ``(T, in)``.
        composed, B, scale, dropout_p, seed: As for ``forward``.

    Returns:
        H, shape ``(T, r)``, for ``backward`` with ``weight=None``.

    Raises:
        RuntimeError: If the kernels cannot take ``x`` or the rank, or Triton is not installed.
        ValueError: If shapes, dtypes or devices disagree, entries of ``out`` share memory, or the probability is out of
            range.
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
        ValueError: If shapes, dtypes or devices disagree, or the probability is out of range.
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
