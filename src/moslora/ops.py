"""The update of ``functional.py`` as one autograd Function: same signature, same values, less work.

With ``A' = M·A`` composed first (r²·in flops, no token dimension) the mixer costs nothing per token:

    H  = x·A'ᵀ                  y  = x·Wᵀ + b + s·H·Bᵀ
    dH = s·G·B                  dB = s·Gᵀ·H
    dA' = dHᵀ·x                 dA = Mᵀ·dA'        dM = dA'·Aᵀ
    dx = G·W + dH·A'

Both sums are accumulated into the base's own product (``addmm_``), so no second ``(tokens, out)`` or
``(tokens, in)`` tensor is made. What is kept for backward is x (which the base layer's input is anyway)
and H, ``(tokens, r)``.

Dropout zeroes entries of x before A' and divides the rest by 1 - p, which goes into s. Drawing a mask is what
dropout costs on a CPU, so only the gaps between dropped entries are drawn, p of the numbers, and only the
positions are kept, a fifth of a byte mask at p = 0.05. In the backward pass the entries of dx at these
positions are put back to what the base's product was before the update was accumulated into it.

Precision: A' is composed, and dA and dM are taken, in the dtype of the factors; products over tokens run
in the dtype of ``x``, or in autocast's. Float32 factors on a bfloat16 base therefore see what they would
see under autocast.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moslora.functional import check_factors

__all__ = ["adapted_linear", "draw_dropped", "fusing", "is_fusing", "low_rank_update", "why_no_fused_dropout"]

_fusing = True

# Above this share of dropped entries their positions, 4 bytes each, are more to keep than a byte mask of all.
LARGEST_SPARSE_DROPOUT = 0.25


def is_fusing() -> bool:
    """Tell whether layers may run base product and update as one Function."""
    return _fusing


@contextlib.contextmanager
def fusing(enabled: bool) -> Iterator[None]:
    """Switch the fused path of adapted layers on or off, to compare it with the slow one.

    Args:
        enabled: Whether layers may take the fused path inside the block.

    Yields:
        Nothing.
    """
    global _fusing
    previous, _fusing = _fusing, enabled
    try:
        yield
    finally:
        _fusing = previous


def why_no_fused_dropout(x: Tensor, p: float) -> str | None:
    """Tell why the update cannot drop entries of ``x`` itself; None if it can.

    Args:
        x: The layer's input.
        p: Probability with which an entry is dropped, in ``[0, 1)``.

    Returns:
        The reason, in words.
    """
    if x.device.type != "cpu":
        return f"dropout by position is for CPUs, and the input is on {x.device.type}"
    if p > LARGEST_SPARSE_DROPOUT:
        return f"dropout {p:g} is above {LARGEST_SPARSE_DROPOUT:g}, where a mask is smaller than positions"
    if torch.compiler.is_compiling():
        return "dropout changes the update's input, and how many entries it drops is not known when compiling"
    return None


def draw_dropped(numel: int, p: float) -> Tensor:
    """Draw which entries are dropped, each with probability ``p``, independently.

    The number of entries kept between two dropped ones is geometric, ``⌊log(1 - u) / log(1 - p)⌋`` with u uniform
    in ``[0, 1)``. Drawn from torch's default generator, so that the same seed, or gradient checkpointing, gives the
    same entries. u has 24 bits: p is met to a few parts in 10⁷, not rounded to a 256th.

    Args:
        numel: How many entries there are.
        p: Probability, in ``(0, 1)``.

    Returns:
        Positions in ascending order, shape ``(dropped,)``, int64, on the CPU.
    """
    found, start = [], 0
    while start < numel:
        left = numel - start
        # Six standard deviations more than expected: a second turn is needed once in a billion.
        count = int(left * p + 6 * math.sqrt(left * p) + 16)
        gaps = torch.rand(count).neg_().log1p_().mul_(1 / math.log1p(-p))
        gaps.clamp_(max=left)  # for a p so small that a gap would be no int64; the conversion is the floor
        positions = gaps.to(torch.int64).add_(1).cumsum(0).add_(start - 1)
        found.append(positions)
        start = int(positions[-1]) + 1
    if not found:
        return torch.empty(0, dtype=torch.int64)
    drawn = found[0] if len(found) == 1 else torch.cat(found)
    return drawn[: int(torch.searchsorted(drawn, numel))]


def _without(x: Tensor, dropped: Tensor | None) -> Tensor:
    """Return ``x`` with the dropped entries at zero."""
    return x if dropped is None else x.flatten().index_fill(0, dropped.long(), 0).view_as(x)


class _MixedUpdate(torch.autograd.Function):
    """``x·Wᵀ + b + s·drop(x)·A'ᵀ·Bᵀ`` with ``A' = M·A``; W and b may be None, and so may ``dropped``."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        M: Tensor,
        B: Tensor,
        scale: float,
        dropped: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            composed = (M @ A).to(x.dtype)  # (r, in)
            H = _without(x, dropped) @ composed.T  # (tokens, r)
            BT = B.to(x.dtype).T  # (r, out)
            if weight is None:
                return (H @ BT).mul_(scale), H  # (tokens, out)
            out = F.linear(x, weight, bias)
            return out.addmm_(H, BT, alpha=scale), H  # (tokens, out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, bias, A, M, B, scale, dropped = inputs
        _, H = output
        ctx.mark_non_differentiable(H)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, A, M, B, H, dropped)
        ctx.scale = scale
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, G: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if G is None:
            return (None,) * 8
        x, weight, A, M, B, H, dropped = ctx.saved_tensors
        need_x, need_weight, need_bias, need_A, need_M, need_B, *_ = ctx.needs_input_grad
        dx = dweight = dbias = dA = dM = dB = None
        with torch.autocast(x.device.type, enabled=False):
            twice = torch.is_grad_enabled()
            if twice:
                # Being differentiated a second time: H must be a function of x, M and A again.
                H = _without(x, dropped) @ (M @ A).to(x.dtype).T
            if need_B:
                dB = (G.T @ H).to(B.dtype) * ctx.scale  # (out, r)
            if need_A or need_M or need_x:
                dH = (G @ B.to(x.dtype)) * ctx.scale  # (tokens, r)
            if need_A or need_M:
                dcomposed = (dH.T @ _without(x, dropped)).to(A.dtype)  # (r, in)
                dA = M.T @ dcomposed if need_A else None  # (r, in)
                dM = dcomposed @ A.T if need_M else None  # (r, r)
            if need_x:
                composed = (M @ A).to(x.dtype)  # (r, in)
            if need_x and (weight is None or twice):
                dx = _without(dH @ composed, dropped)  # (tokens, in)
                dx = dx if weight is None else G @ weight + dx
            elif need_x:
                dx = G @ weight
                if dropped is None:
                    dx.addmm_(dH, composed)  # (tokens, in)
                else:
                    positions, flat = dropped.long(), dx.view(-1)
                    kept = flat.take(positions)
                    dx.addmm_(dH, composed)
                    flat.put_(positions, kept)
            if need_weight:
                dweight = G.T @ x  # (out, in)
            if need_bias:
                dbias = G.sum(0).to(ctx.bias_dtype)  # (out,)
        return dx, dweight, dbias, dA, dM, dB, None, None


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def low_rank_update(x: Tensor, A: Tensor, M: Tensor, B: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    """Apply the update to ``x``, composing M·A first.

    Args:
        x: Input, shape ``(..., in)``, any float dtype.
        A, M, B: Factors, shapes ``(r, in)``, ``(r, r)``, ``(out, r)``, one dtype.
        scale: ``alpha / r``, unitless.
        dropout: Probability with which an entry of x is dropped, in ``[0, 1)``; 0 in inference.

    Returns:
        ``scale · drop(x) Aᵀ Mᵀ Bᵀ``, shape ``(..., out)``, dtype of ``x``, or autocast's.

    Raises:
        ValueError: If the inner sizes disagree, or entries of this ``x`` cannot be dropped here.
    """
    return adapted_linear(x, None, None, A, M, B, scale, dropout)


def adapted_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    M: Tensor,
    B: Tensor,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Run a linear layer and its update as one Function.

    Args:
        x: Input, shape ``(..., in)``, any float dtype.
        weight: The base layer's weight, shape ``(out, in)``, dtype of ``x`` unless autocast is on. None
            leaves the base product out.
        bias: The base layer's bias, shape ``(out,)``, or None.
        A, M, B: Factors, shapes ``(r, in)``, ``(r, r)``, ``(out, r)``, one dtype.
        scale: ``alpha / r``, unitless.
        dropout: Probability with which an entry of x is dropped before A, the others being divided by
            ``1 - dropout``; in ``[0, 1)``, 0 in inference. See ``why_no_fused_dropout``.

    Returns:
        ``x Wᵀ + b + scale · drop(x) Aᵀ Mᵀ Bᵀ``, shape ``(..., out)``, dtype of ``x``, or autocast's.

    Raises:
        ValueError: If the inner sizes disagree, or entries of this ``x`` cannot be dropped here.
    """
    check_factors(A, M, B)
    if x.shape[-1] != A.shape[1]:
        raise ValueError(f"x has {x.shape[-1]} features, but A {tuple(A.shape)} takes {A.shape[1]}.")
    dtype = _compute_dtype(x)
    flat = x.reshape(-1, x.shape[-1]).to(dtype)  # (tokens, in)
    weight = weight if weight is None else weight.to(dtype)
    bias = bias if bias is None else bias.to(dtype)
    dropped = None
    if dropout:
        reason = why_no_fused_dropout(x, dropout)
        if reason is not None:
            raise ValueError(f"{reason}; drop entries of x with torch's own dropout, and pass dropout=0.")
        positions = draw_dropped(flat.numel(), dropout)
        dropped = positions.int() if flat.numel() < 2**31 else positions  # half of what is kept for backward
    effective = float(scale) / (1 - dropout)
    out, _ = _MixedUpdate.apply(flat, weight, bias, A, M, B, effective, dropped)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], B.shape[0])  # type: ignore[no-any-return]
