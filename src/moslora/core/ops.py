"""The update of ``functional.py`` as one autograd Function: same signature, same values, less work.

With ``A' = s·M·A`` composed first (r²·in flops, no token dimension) the mixer costs nothing per token:

    H  = x·A'ᵀ                  y  = x·Wᵀ + b + H·Bᵀ
    D  = G·B                    dB = Gᵀ·H
    dA' = Dᵀ·x                  dA = s·Mᵀ·dA'      dM = s·dA'·Aᵀ
    dx = G·W + D·A'

Over fewer tokens than the layer has inputs, as in a short batch or in generating token by token, M is applied between
two products instead, which costs r²·tokens (``chains`` decides):

    K  = x·Aᵀ                   H  = s·K·Mᵀ        y and dB as above
    dM = s·Dᵀ·K                 E  = s·D·M         dA = Eᵀ·x        dx = G·W + E·A

Both sums are accumulated into the base's own product (``addmm_``), so no second ``(tokens, out)`` or
``(tokens, in)`` tensor is made; the scale stands with M, so no pass is made for it either. What is kept for backward is
x (which the base layer's input is anyway) and H or K, ``(tokens, r)``.

Dropout zeroes entries of x before A' and divides the rest by 1 - p. On a CPU it is drawn by position (``dropout.py``),
and 1 - p goes into s; in the backward pass the entries of dx at the dropped positions are put back to what the base's
product was before the update was accumulated into it. Elsewhere torch draws a mask, and a byte an entry is kept.

Where the base layer has to run by itself (a quantized one), its output is an operand of the Function's last product.

Precision: A' is composed, and M applied, in the dtype of M, as are the gradients of M and of M·A; products
over tokens that have in or out columns run in the dtype of ``x``, or in autocast's. Float32 factors on a bfloat16 base
therefore see what they would see under autocast.

On a GPU the Triton kernels of ``kernels/`` can do the same, where ``MOSLORA_KERNELS=1`` asks for them. On an H100 they
gained nothing without dropout and 4 % of a step with it, so they are off otherwise (``kernel_update.py``).
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from moslora.compat.torch import is_under_functorch
from moslora.core import switches
from moslora.core.autocast import compute_dtype, in_dtype, is_autocasting
from moslora.core.dropout import draw_dropped, why_no_dropout_by_mask, why_no_dropout_by_position
from moslora.core.few_tokens import by_few_operations, is_for_few_operations
from moslora.core.functional import check_factors
from moslora.core.fused_update import MixedUpdate, by_torch_alone, chains, without_keeping_x
from moslora.core.kernel_update import KernelUpdate, may_use_kernels, why_no_kernels
from moslora.core.notices import tell_once
from moslora.core.switches import fusing, is_fusing, is_using_kernels, using_kernels

__all__ = [
    "adapted_linear",
    "by_few_operations",
    "chains",
    "draw_dropped",
    "fusing",
    "is_autocasting",
    "is_for_few_operations",
    "is_fusing",
    "is_using_kernels",
    "low_rank_update",
    "using_kernels",
    "why_no_dropout_by_position",
    "why_no_fused_dropout",
]

logger = logging.getLogger(__name__)

OFF_KERNELS = "The Triton kernels are not used; the update runs on torch's operations: %s."


def why_no_fused_dropout(x: Tensor, p: float) -> str | None:
    """Tell why the update cannot drop entries of ``x`` itself; None if it can.

    Args:
        x: The layer's input.
        p: Probability with which an entry is dropped, in ``[0, 1)``.

    Returns:
        The reason, in words.
    """
    if p < 1 and may_use_kernels(x, compute_dtype(x), 1):
        return None
    return why_no_dropout_by_position(x, p) if x.device.type == "cpu" else why_no_dropout_by_mask(p)


def low_rank_update(x: Tensor, A: Tensor, M: Tensor, B: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    """Apply the update to ``x``, composing M·A first.

    Args:
        x: Input, shape ``(..., in)``, any float dtype.
        A, M, B: Factors, shapes ``(r, in)``, ``(r, r)``, ``(out, r)``; A and B of one dtype, M of it or a wider one.
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
    beside: Tensor | None = None,
) -> Tensor:
    """Run a linear layer and its update as one Function.

    Args:
        x: Input, shape ``(..., in)``, any float dtype.
        weight: The base layer's weight, shape ``(out, in)``, dtype of ``x`` unless autocast is on. None
            leaves the base product out.
        bias: The base layer's bias, shape ``(out,)``, or None.
        A, M, B: Factors, shapes ``(r, in)``, ``(r, r)``, ``(out, r)``; A and B of one dtype, M of it or a wider one.
        scale: ``alpha / r``, unitless.
        dropout: Probability with which an entry of x is dropped before A, the others being divided by
            ``1 - dropout``; in ``[0, 1)``, 0 in inference. See ``why_no_fused_dropout``.
        beside: What the base layer gave for ``x``, shape ``(..., out)``, if it ran by itself (``weight`` is None then);
            of the output's dtype.

    Returns:
        ``x Wᵀ + b + scale · drop(x) Aᵀ Mᵀ Bᵀ``, shape ``(..., out)``, dtype of ``x``, or autocast's.

    Raises:
        ValueError: If the inner sizes disagree, or entries of this ``x`` cannot be dropped here.
    """
    check_factors(A, M, B)
    if x.shape[-1] != A.shape[1]:
        raise ValueError(f"x has {x.shape[-1]} features, but A {tuple(A.shape)} takes {A.shape[1]}.")
    dtype = compute_dtype(x)
    inputs = in_dtype(dtype, x)
    weight = weight if weight is None else in_dtype(dtype, weight)
    bias = bias if bias is None else in_dtype(dtype, bias)
    if switches.kernels_are_on and not torch.compiler.is_compiling():
        flat = inputs.reshape(-1, x.shape[-1])  # (tokens, in)
        unfit = why_no_kernels(flat, weight, bias, A, B, dropout)
        if unfit is None:
            # From the generator of the device, so that seeds and gradient checkpointing decide the mask.
            seed = torch.randint(2**62, (1,), device=x.device) if dropout else None
            whole = KernelUpdate.apply(flat, weight, bias, A, M, B, float(scale), dropout, seed)  # type: ignore[no-untyped-call]
            whole = whole.view(*x.shape[:-1], B.shape[0])
            return whole if beside is None else beside + whole  # type: ignore[no-any-return]
        tell_once(logger, OFF_KERNELS, unfit)
    drop: Tensor | float | None = None
    if dropout:
        reason = why_no_fused_dropout(x, dropout)
        if reason is not None:
            raise ValueError(f"{reason}; drop entries of x with torch's own dropout, and pass dropout=0.")
        if why_no_dropout_by_position(x, dropout) is not None:
            drop = float(dropout)
        else:
            positions = draw_dropped(x.numel(), dropout)
            drop = positions.int() if x.numel() < 2**31 else positions  # half of what is kept for backward
            scale = scale / (1 - dropout)
    arguments = (inputs, weight, bias, A, M, B, float(scale), drop, beside)
    if torch.is_grad_enabled() and not A.requires_grad and (M.requires_grad or B.requires_grad):
        return without_keeping_x(*arguments)
    if not torch.compiler.is_compiling() and is_under_functorch():
        return by_torch_alone(*arguments)
    return MixedUpdate.apply(*arguments)  # type: ignore[no-untyped-call, no-any-return]
