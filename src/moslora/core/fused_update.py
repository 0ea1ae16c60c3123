"""Base product and update as one autograd Function, and the same of operations that torch can transform.

``ops.py`` has the equations, and chooses. Notation as there: A' is ``s·M·A``, G the gradient of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moslora.core.autocast import in_dtype, without_autocast
from moslora.core.dropout import without

__all__ = ["MixedUpdate", "by_torch_alone", "chains", "without_keeping_x"]


def chains(tokens: int, features: int) -> bool:
    """Tell whether M is cheaper applied to so few tokens than composed into A.

    Both passes together, it is four products of 2·r²·features operations (M·A twice, Mᵀ·dA', dA'·Aᵀ) against four of
    2·r²·tokens (K·Mᵀ twice, D·M, Dᵀ·K).

    Args:
        tokens: How many rows the layer's input has.
        features: How many inputs the layer has.
    """
    return tokens < features


def _mix(H: Tensor, M: Tensor) -> Tensor:
    """Mix columns of rank r in the dtype of the factors."""
    return in_dtype(H.dtype, in_dtype(M.dtype, H) @ M)  # (tokens, r)


class MixedUpdate(torch.autograd.Function):
    """``x·Wᵀ + b + s·drop(x)·Aᵀ·Mᵀ·Bᵀ``; W and b may be None, and so may ``dropped``."""

    # One method with ctx, not a setup_context: torch looks that one's signature up in every call, 50 µs each.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        M: Tensor,
        B: Tensor,
        scale: float,
        dropped: Tensor | None,
    ) -> Tensor:
        """Compute the output, and keep x and what is of rank r."""
        with without_autocast(x.device.type):
            rows, scaled = x.reshape(-1, x.shape[-1]), M * scale  # (tokens, in), (r, r)
            chained = chains(*rows.shape)
            low = in_dtype(x.dtype, A if chained else scaled @ in_dtype(M.dtype, A))  # (r, in)
            kept = without(rows, dropped) @ low.T  # (tokens, r): K if chained, else H
            H = _mix(kept, scaled.T) if chained else kept  # (tokens, r)
            up = in_dtype(x.dtype, B)
            if weight is None:
                out = F.linear(H.view(*x.shape[:-1], len(M)), up)  # (..., out)
            else:
                out = F.linear(rows.view(x.shape), weight, bias)  # (..., out)
                out.view(-1, len(B)).addmm_(H, up.T)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, A, M, B, kept, dropped)
        ctx.scale = scale
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out

    @staticmethod
    def backward(ctx: Any, G: Tensor | None) -> tuple[Tensor | None, ...]:
        """Compute the gradients that are needed; by differentiable operations if they are differentiated again."""
        if G is None:
            return (None,) * 8
        x, weight, A, M, B, kept, dropped = ctx.saved_tensors
        need_x, need_weight, need_bias, *need_factors, _, _ = ctx.needs_input_grad
        dx = dweight = dbias = None
        with without_autocast(x.device.type):
            is_differentiated = torch.is_grad_enabled()
            G, rows = G.reshape(-1, len(B)), x.reshape(-1, x.shape[-1])
            gradients = _chained_gradients if chains(*rows.shape) else _composed_gradients
            left, low, *of_factors = gradients(
                G,
                rows,
                (A, M, B),
                ctx.scale,
                None if is_differentiated else kept,
                dropped,
                need_x,
                need_factors,
            )
            if need_x:
                if weight is None or is_differentiated:
                    dx = _input_gradient(G, weight, left, low, dropped)  # (tokens, in)
                else:
                    dx = _input_gradient_in_place(G, weight, left, low, dropped)  # (tokens, in)
                dx = dx.view(x.shape)
            if need_weight:
                dweight = G.T @ rows  # (out, in)
            if need_bias:
                dbias = G.sum(0).to(ctx.bias_dtype)  # (out,)
        return dx, dweight, dbias, *of_factors, None, None


# Both return two matrices, ``(tokens, r)`` and ``(r, in)``, whose product is the update's part of dx before dropout
# (unspecified where dx is not needed), and dA, dM, dB. ``kept`` is what forward kept; None computes it again, as a
# function of x, M and A.


def _composed_gradients(
    G: Tensor,
    rows: Tensor,
    factors: tuple[Tensor, Tensor, Tensor],
    scale: float,
    kept: Tensor | None,
    dropped: Tensor | None,
    need_x: bool,
    need_factors: Sequence[bool],
) -> tuple[Any, ...]:
    """Take the gradients where M was composed into A."""
    (A, M, B), (need_A, need_M, need_B) = factors, need_factors
    dA = dM = dB = D = None
    scaled = M * scale
    composed: Any = None
    if need_x or kept is None:
        composed = in_dtype(rows.dtype, scaled @ in_dtype(M.dtype, A))  # (r, in)
    H: Any = without(rows, dropped) @ composed.T if kept is None else kept  # (tokens, r)
    if need_B:
        dB = in_dtype(B.dtype, G.T @ H)  # (out, r)
    if need_A or need_M or need_x:
        D = G @ in_dtype(rows.dtype, B)  # (tokens, r)
    if D is not None and (need_A or need_M):
        dcomposed = in_dtype(M.dtype, D.T @ without(rows, dropped))  # (r, in)
        dA = in_dtype(A.dtype, scaled.T @ dcomposed) if need_A else None  # (r, in)
        dM = (dcomposed @ in_dtype(M.dtype, A).T) * scale if need_M else None  # (r, r)
    return D, composed, dA, dM, dB


def _chained_gradients(
    G: Tensor,
    rows: Tensor,
    factors: tuple[Tensor, Tensor, Tensor],
    scale: float,
    kept: Tensor | None,
    dropped: Tensor | None,
    need_x: bool,
    need_factors: Sequence[bool],
) -> tuple[Any, ...]:
    """Take the gradients where M was applied between two products."""
    (A, M, B), (need_A, need_M, need_B) = factors, need_factors
    dA = dM = dB = E = None
    scaled = M * scale
    low: Any = in_dtype(rows.dtype, A) if need_x or kept is None else None  # (r, in)
    K: Any = without(rows, dropped) @ low.T if kept is None else kept  # (tokens, r)
    if need_B:
        dB = in_dtype(B.dtype, G.T @ _mix(K, scaled.T))  # (out, r)
    if need_A or need_M or need_x:
        D = G @ in_dtype(rows.dtype, B)  # (tokens, r)
        if need_M:
            dM = (in_dtype(M.dtype, D).T @ in_dtype(M.dtype, K)) * scale  # (r, r)
        if need_A or need_x:
            E = _mix(D, scaled)  # (tokens, r)
            if need_A:
                dA = in_dtype(A.dtype, E.T @ without(rows, dropped))  # (r, in)
    return E, low, dA, dM, dB


def _input_gradient(
    G: Tensor, weight: Tensor | None, left: Tensor, low: Tensor, dropped: Tensor | None
) -> Tensor:
    """Return the gradient of x by operations that can be differentiated again."""
    of_update = without(left @ low, dropped)
    return of_update if weight is None else G @ weight + of_update


def _input_gradient_in_place(
    G: Tensor, weight: Tensor, left: Tensor, low: Tensor, dropped: Tensor | None
) -> Tensor:
    """Return the gradient of x: the update's part is accumulated into the base's, but for the dropped entries."""
    dx = G @ weight
    if dropped is None:
        return dx.addmm_(left, low)
    positions, flat = dropped.long(), dx.view(-1)
    undisturbed = flat.index_select(0, positions)
    dx.addmm_(left, low)
    flat.put_(positions, undisturbed)
    return dx


def by_torch_alone(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    M: Tensor,
    B: Tensor,
    scale: float,
    dropped: Tensor | None,
) -> Tensor:
    """Return what ``MixedUpdate`` does, of operations that torch can transform in every way."""
    with without_autocast(x.device.type):
        low = (M * scale @ A.to(M.dtype)).to(x.dtype)  # (r, in)
        out = F.linear(F.linear(without(x, dropped), low), B.to(x.dtype))  # (..., out)
        return out if weight is None else F.linear(x, weight, bias) + out


def without_keeping_x(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    M: Tensor,
    B: Tensor,
    scale: float,
    dropped: Tensor | None,
) -> Tensor:
    """Return what ``MixedUpdate`` does where A is frozen, so that backward needs products of rank r in x's place."""
    with without_autocast(x.device.type):
        H = F.linear(without(x, dropped), in_dtype(x.dtype, A))  # (..., r)
        H = in_dtype(x.dtype, F.linear(in_dtype(M.dtype, H), M * scale))  # (..., r)
        out = F.linear(H, in_dtype(x.dtype, B))  # (..., out)
        return out if weight is None else F.linear(x, weight, bias) + out
