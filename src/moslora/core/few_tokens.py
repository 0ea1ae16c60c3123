"""The update of ``ops.py`` over few tokens, by as few operations of torch as it takes.

Where a layer has little to compute, as in generating token by token, the time goes into what Python and autograd do
around four small products. So these are made directly, without a Function of their own:

    K = x·Aᵀ      H = K·Mᵀ      y = x·Wᵀ + b, then y += s·H·Bᵀ in place

or with ``M·A`` composed, where there are more tokens than inputs (``chains``). Over many tokens the Function is better:
it keeps less for backward, and accumulates the gradient of x in place.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moslora.compat.torch import is_under_functorch
from moslora.core import switches
from moslora.core.autocast import is_autocasting
from moslora.core.fused_update import chains

__all__ = ["by_few_operations", "is_for_few_operations"]

# Entries of x at most: 64 tokens of width 1024. Measured by ``benchmarks/layer.py`` on two cores: beyond, the time of
# the products hides what is around them.
FEW = 1 << 16


def is_for_few_operations(x: Tensor) -> bool:
    """Tell whether a layer's input is so small that few operations count, and nothing wants other ones.

    Args:
        x: The layer's input.

    Returns:
        False where torch traces or transforms what runs, where autocast is on, and where a switch asks for another way.
    """
    return (
        type(x) is Tensor
        and x.numel() <= FEW
        and not torch.compiler.is_compiling()
        and not is_under_functorch()
        and not is_autocasting(x.device.type)
        and not switches.kernels_are_on
        and switches.is_fusing()
    )


def by_few_operations(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, M: Tensor, B: Tensor, scale: float
) -> Tensor:
    """Run a linear layer and its update.

    Args:
        x: Input, shape ``(..., in)``.
        weight, bias: The base layer's, shapes ``(out, in)`` and ``(out,)``.
        A, M, B: Factors, shapes ``(r, in)``, ``(r, r)``, ``(out, r)``; all of one dtype with ``x`` and ``weight``.
        scale: ``alpha / r``, unitless.

    Returns:
        ``x Wᵀ + b + scale · x Aᵀ Mᵀ Bᵀ``, shape ``(..., out)``.
    """
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])  # (tokens, in)
    out = F.linear(rows, weight, bias)  # (tokens, out)
    H = F.linear(F.linear(rows, A), M) if chains(*rows.shape) else F.linear(rows, M @ A)  # (tokens, r)
    out.addmm_(H, B.T, alpha=scale)  # out is no view, so that autograd takes it as it is
    return out if x.ndim == 2 else out.view(*x.shape[:-1], out.shape[-1])
