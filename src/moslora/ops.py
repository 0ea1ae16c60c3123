"""The update of ``functional.py`` as one autograd Function: same signature, same values, less work.

With ``A' = M·A`` composed first (r²·in flops, no token dimension) the mixer costs nothing per token:

    H  = x·A'ᵀ                  y  = x·Wᵀ + b + s·H·Bᵀ
    dH = s·G·B                  dB = s·Gᵀ·H
    dA' = dHᵀ·x                 dA = Mᵀ·dA'        dM = dA'·Aᵀ
    dx = G·W + dH·A'

Both sums are accumulated into the base's own product (``addmm_``), so no second ``(tokens, out)`` or
``(tokens, in)`` tensor is made. What is kept for backward is x (which the base layer's input is anyway)
and H, ``(tokens, r)``.

Precision: A' is composed, and dA and dM are taken, in the dtype of the factors; products over tokens run
in the dtype of ``x``, or in autocast's. Float32 factors on a bfloat16 base therefore see what they would
see under autocast.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moslora.functional import check_factors

__all__ = ["adapted_linear", "fusing", "is_fusing", "low_rank_update"]

_fusing = True


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


class _MixedUpdate(torch.autograd.Function):
    """``x·Wᵀ + b + s·x·A'ᵀ·Bᵀ`` with ``A' = M·A``; W and b may be None."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        M: Tensor,
        B: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            composed = (M @ A).to(x.dtype)  # (r, in)
            H = x @ composed.T  # (tokens, r)
            BT = B.to(x.dtype).T  # (r, out)
            if weight is None:
                return (H @ BT).mul_(scale), H  # (tokens, out)
            out = F.linear(x, weight, bias)
            return out.addmm_(H, BT, alpha=scale), H  # (tokens, out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, bias, A, M, B, scale = inputs
        _, H = output
        ctx.mark_non_differentiable(H)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, A, M, B, H)
        ctx.scale = scale
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, G: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if G is None:
            return (None,) * 7
        x, weight, A, M, B, H = ctx.saved_tensors
        need_x, need_weight, need_bias, need_A, need_M, need_B, _need_scale = ctx.needs_input_grad
        dx = dweight = dbias = dA = dM = dB = None
        with torch.autocast(x.device.type, enabled=False):
            if torch.is_grad_enabled():
                # Being differentiated a second time: H must be a function of x, M and A again.
                H = x @ (M @ A).to(x.dtype).T
            if need_B:
                dB = (G.T @ H).to(B.dtype) * ctx.scale  # (out, r)
            if need_A or need_M or need_x:
                dH = (G @ B.to(x.dtype)) * ctx.scale  # (tokens, r)
            if need_A or need_M:
                dcomposed = (dH.T @ x).to(A.dtype)  # (r, in)
                dA = M.T @ dcomposed if need_A else None  # (r, in)
                dM = dcomposed @ A.T if need_M else None  # (r, r)
            if need_x:
                composed = (M @ A).to(x.dtype)  # (r, in)
                dx = dH @ composed if weight is None else (G @ weight).addmm_(dH, composed)  # (tokens, in)
            if need_weight:
                dweight = G.T @ x  # (out, in)
            if need_bias:
                dbias = G.sum(0).to(ctx.bias_dtype)  # (out,)
        return dx, dweight, dbias, dA, dM, dB, None


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def low_rank_update(x: Tensor, A: Tensor, M: Tensor, B: Tensor, scale: float) -> Tensor:
    """Apply the update to ``x``, composing M·A first.

    Args:
        x: Input, shape ``(..., in)``, any float dtype.
        A, M, B: Factors, shapes ``(r, in)``, ``(r, r)``, ``(out, r)``, one dtype.
        scale: ``alpha / r``, unitless.

    Returns:
        ``scale · x Aᵀ Mᵀ Bᵀ``, shape ``(..., out)``, dtype of ``x``, or autocast's.

    Raises:
        ValueError: If the inner sizes disagree.
    """
    return adapted_linear(x, None, None, A, M, B, scale)


def adapted_linear(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, A: Tensor, M: Tensor, B: Tensor, scale: float
) -> Tensor:
    """Run a linear layer and its update as one Function.

    Args:
        x: Input, shape ``(..., in)``, any float dtype.
        weight: The base layer's weight, shape ``(out, in)``, dtype of ``x`` unless autocast is on. None
            leaves the base product out.
        bias: The base layer's bias, shape ``(out,)``, or None.
        A, M, B: Factors, shapes ``(r, in)``, ``(r, r)``, ``(out, r)``, one dtype.
        scale: ``alpha / r``, unitless.

    Returns:
        ``x Wᵀ + b + scale · x Aᵀ Mᵀ Bᵀ``, shape ``(..., out)``, dtype of ``x``, or autocast's.

    Raises:
        ValueError: If the inner sizes disagree.
    """
    check_factors(A, M, B)
    if x.shape[-1] != A.shape[1]:
        raise ValueError(f"x has {x.shape[-1]} features, but A {tuple(A.shape)} takes {A.shape[1]}.")
    dtype = _compute_dtype(x)
    flat = x.reshape(-1, x.shape[-1]).to(dtype)  # (tokens, in)
    weight = weight if weight is None else weight.to(dtype)
    bias = bias if bias is None else bias.to(dtype)
    out, _ = _MixedUpdate.apply(flat, weight, bias, A, M, B, float(scale))  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], B.shape[0])  # type: ignore[no-any-return]
