"""Base product and update as one autograd Function, and the same of operations that torch can transform.

``ops.py`` has the equations, and chooses. Notation as there: A' is ``s·M·A``, G the gradient of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moslora.core.autocast import in_dtype, without_autocast
from moslora.core.dropout import without

__all__ = ["MixedUpdate", "by_torch_alone", "chains", "without_keeping_x"]

# Factors as they were multiplied with are kept for the backward pass where a batch has so many tokens for each rank:
# then they are a sixteenth of the layer's input, or less, and need not be composed and cast again.
TOKENS_A_RANK = 32


def chains(tokens: int, features: int) -> bool:
    """Tell whether M is cheaper applied to so few tokens than composed into A.

    Both passes together, it is four products of 2·r²·features operations (M·A twice, Mᵀ·dA', dA'·Aᵀ) against four of
    2·r²·tokens (K·Mᵀ twice, D·M, Dᵀ·K).

    Args:
        tokens: How many rows the layer's input has.
        features: How many inputs the layer has.
    """
    return tokens < features


def _scaled(scale: float, one: Tensor, other: Tensor) -> Tensor:
    """Return ``scale · one · other`` of two matrices, in one launch; the first operand is not read."""
    return torch.addmm(one.new_empty(1), one, other, beta=0, alpha=scale)


def _mix(H: Tensor, M: Tensor, scale: float) -> Tensor:
    """Mix columns of rank r in the dtype of the factors."""
    return in_dtype(H.dtype, _scaled(scale, in_dtype(M.dtype, H), M))  # (tokens, r)


@dataclass(frozen=True)
class _Drop:
    """Which entries of x are dropped: by position, the rest divided by ``1 - p`` in s; or by mask and divided here."""

    positions: Tensor | None = None
    mask: Tensor | None = None  # True where an entry is kept
    p: float = 0.0

    def of(self, rows: Tensor) -> Tensor:
        """Return rows with the dropped entries at zero."""
        if self.mask is not None:
            return torch.ops.aten.native_dropout_backward(rows, self.mask, 1 / (1 - self.p))  # type: ignore[no-any-return]
        return without(rows, self.positions)


class MixedUpdate(torch.autograd.Function):
    """``x·Wᵀ + b + s·drop(x)·Aᵀ·Mᵀ·Bᵀ``; W and b may be None, and so may what is dropped.

    ``drop`` is what ``dropout.draw_dropped`` gives, or a probability: then torch draws a mask, from the device's
    generator, of which a byte is kept for each entry. ``beside``, if given, stands for the base's product.
    """

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
        drop: Tensor | float | None,
        beside: Tensor | None = None,
    ) -> Tensor:
        """Compute the output, and keep x and what is of rank r."""
        with without_autocast(x.device.type):
            rows = x.reshape(-1, x.shape[-1])  # (tokens, in)
            chained, p = chains(*rows.shape), drop if isinstance(drop, float) else 0.0
            positions = drop if isinstance(drop, Tensor) else None
            low = in_dtype(x.dtype, A if chained else _scaled(scale, M, in_dtype(M.dtype, A)))  # (r, in)
            dropped, mask = torch.native_dropout(rows, p, True) if p else (without(rows, positions), None)
            first = dropped @ low.T  # (tokens, r)
            H = _mix(first, M.T, scale) if chained else first  # (tokens, r)
            up = in_dtype(x.dtype, B)
            if beside is not None:
                out = torch.addmm(beside.reshape(-1, len(B)), H, up.T).view(beside.shape)  # (..., out)
            elif weight is None:
                out = F.linear(H.view(*x.shape[:-1], len(M)), up)  # (..., out)
            else:
                out = F.linear(rows.view(x.shape), weight, bias)  # (..., out)
                out.view(-1, len(B)).addmm_(H, up.T)
        kept = (low, up) if len(rows) >= TOKENS_A_RANK * len(M) else (None, None)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, A, M, B, first, positions, mask, *kept)
        ctx.scale, ctx.p = scale, p
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out

    @staticmethod
    def backward(ctx: Any, G: Tensor | None) -> tuple[Tensor | None, ...]:
        """Compute the gradients that are needed; by differentiable operations if they are differentiated again."""
        if G is None:
            return (None,) * 9
        x, weight, A, M, B, first, positions, mask, low, up = ctx.saved_tensors
        need_x, need_weight, need_bias, *need_factors, _, _, need_beside = ctx.needs_input_grad
        dx = dweight = dbias = None
        drop = _Drop(positions, mask, ctx.p)
        with without_autocast(x.device.type):
            is_differentiated = torch.is_grad_enabled()
            dbeside = G if need_beside else None
            G, rows = G.reshape(-1, len(B)), x.reshape(-1, x.shape[-1])
            again = _Again(first, low, up) if not is_differentiated else _Again()
            gradients = _chained_gradients if chains(*rows.shape) else _composed_gradients
            left, low, *of_factors = gradients(
                G, rows, (A, M, B), ctx.scale, again, drop, need_x, need_factors
            )
            if need_x:
                if weight is None or is_differentiated:
                    dx = _input_gradient(G, weight, left, low, drop)  # (tokens, in)
                else:
                    dx = _input_gradient_in_place(G, weight, left, low, drop)  # (tokens, in)
                dx = dx.view(x.shape)
            if need_weight:
                dweight = G.T @ rows  # (out, in)
            if need_bias:
                dbias = G.sum(0).to(ctx.bias_dtype)  # (out,)
        return dx, dweight, dbias, *of_factors, None, None, dbeside


@dataclass(frozen=True)
class _Again:
    """What forward computed and backward needs; None is computed again, as a function of x, M, A and B.

    Attributes:
        first: ``(tokens, r)``: x times what it was multiplied with.
        low: ``(r, in)``: that, A or A'.
        up: ``(out, r)``: B in the dtype of x.
    """

    first: Tensor | None = None
    low: Tensor | None = None
    up: Tensor | None = None


# Both return two matrices, ``(tokens, r)`` and ``(r, in)``, whose product is the update's part of dx before dropout
# (unspecified where dx is not needed), and dA, dM, dB.


def _composed_gradients(
    G: Tensor,
    rows: Tensor,
    factors: tuple[Tensor, Tensor, Tensor],
    scale: float,
    again: _Again,
    drop: _Drop,
    need_x: bool,
    need_factors: Sequence[bool],
) -> tuple[Any, ...]:
    """Take the gradients where M was composed into A."""
    (A, M, B), (need_A, need_M, need_B) = factors, need_factors
    dA = dM = dB = D = None
    composed: Any = again.low
    if composed is None and (need_x or again.first is None):
        composed = in_dtype(rows.dtype, _scaled(scale, M, in_dtype(M.dtype, A)))  # (r, in)
    H: Any = drop.of(rows) @ composed.T if again.first is None else again.first  # (tokens, r)
    if need_B:
        dB = in_dtype(B.dtype, G.T @ H)  # (out, r)
    if need_A or need_M or need_x:
        D = G @ (in_dtype(rows.dtype, B) if again.up is None else again.up)  # (tokens, r)
    if D is not None and (need_A or need_M):
        dcomposed = in_dtype(M.dtype, D.T @ drop.of(rows))  # (r, in)
        dA = in_dtype(A.dtype, _scaled(scale, M.T, dcomposed)) if need_A else None  # (r, in)
        dM = _scaled(scale, dcomposed, in_dtype(M.dtype, A).T) if need_M else None  # (r, r)
    return D, composed, dA, dM, dB


def _chained_gradients(
    G: Tensor,
    rows: Tensor,
    factors: tuple[Tensor, Tensor, Tensor],
    scale: float,
    again: _Again,
    drop: _Drop,
    need_x: bool,
    need_factors: Sequence[bool],
) -> tuple[Any, ...]:
    """Take the gradients where M was applied between two products."""
    (A, M, B), (need_A, need_M, need_B) = factors, need_factors
    dA = dM = dB = E = None
    low: Any = again.low
    if low is None and (need_x or again.first is None):
        low = in_dtype(rows.dtype, A)  # (r, in)
    K: Any = drop.of(rows) @ low.T if again.first is None else again.first  # (tokens, r)
    if need_B:
        dB = in_dtype(B.dtype, G.T @ _mix(K, M.T, scale))  # (out, r)
    if need_A or need_M or need_x:
        D = G @ (in_dtype(rows.dtype, B) if again.up is None else again.up)  # (tokens, r)
        if need_M:
            dM = _scaled(scale, in_dtype(M.dtype, D).T, in_dtype(M.dtype, K))  # (r, r)
        if need_A or need_x:
            E = _mix(D, M, scale)  # (tokens, r)
            if need_A:
                dA = in_dtype(A.dtype, E.T @ drop.of(rows))  # (r, in)
    return E, low, dA, dM, dB


def _input_gradient(G: Tensor, weight: Tensor | None, left: Tensor, low: Tensor, drop: _Drop) -> Tensor:
    """Return the gradient of x by operations that can be differentiated again."""
    of_update = drop.of(left @ low)
    return of_update if weight is None else G @ weight + of_update


def _input_gradient_in_place(G: Tensor, weight: Tensor, left: Tensor, low: Tensor, drop: _Drop) -> Tensor:
    """Return the gradient of x: the update's part is accumulated into the base's, but for the dropped entries."""
    dx = G @ weight
    if drop.mask is not None:
        return dx.add_(drop.of(left @ low))
    if drop.positions is None:
        return dx.addmm_(left, low)
    positions, flat = drop.positions.long(), dx.view(-1)
    undisturbed = flat.index_select(0, positions)
    dx.addmm_(left, low)
    flat.put_(positions, undisturbed)
    return dx


def _drop_for_torch(x: Tensor, drop: Tensor | float | None) -> Tensor:
    return F.dropout(x, drop) if isinstance(drop, float) else without(x, drop)


def by_torch_alone(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    M: Tensor,
    B: Tensor,
    scale: float,
    drop: Tensor | float | None,
    beside: Tensor | None = None,
) -> Tensor:
    """Return what ``MixedUpdate`` does, of operations that torch can transform in every way."""
    with without_autocast(x.device.type):
        low = (M * scale @ A.to(M.dtype)).to(x.dtype)  # (r, in)
        out = F.linear(F.linear(_drop_for_torch(x, drop), low), B.to(x.dtype))  # (..., out)
        return _beside_base(x, weight, bias, beside, out)


def without_keeping_x(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    M: Tensor,
    B: Tensor,
    scale: float,
    drop: Tensor | float | None,
    beside: Tensor | None = None,
) -> Tensor:
    """Return what ``MixedUpdate`` does where A is frozen, so that backward needs products of rank r in x's place."""
    with without_autocast(x.device.type):
        H = F.linear(_drop_for_torch(x, drop), in_dtype(x.dtype, A))  # (..., r)
        H = in_dtype(x.dtype, F.linear(in_dtype(M.dtype, H), M * scale))  # (..., r)
        out = F.linear(H, in_dtype(x.dtype, B))  # (..., out)
        return _beside_base(x, weight, bias, beside, out)


def _beside_base(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, beside: Tensor | None, update: Tensor
) -> Tensor:
    """Add the update to what the base gives, if it gives anything."""
    if beside is not None:
        return beside + update
    return update if weight is None else F.linear(x, weight, bias) + update
