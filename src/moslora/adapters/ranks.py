"""Other ranks: the nearest ΔW of a given rank, and a higher rank filled up with zeros.

The singular values of ``ΔW = s·B·M·A`` follow from those of the product of its R factors: with ``B = Q·R`` and
``(M·A)ᵀ = P·S`` they are those of ``R·Sᵀ``, a matrix of the size of the rank. ΔW itself is never built.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moslora.adapters.arithmetic import distance
from moslora.adapters.factors import Adapter, Factors
from moslora.errors import UsageError

__all__ = ["Ranked", "nearest", "pad", "to_rank"]


def nearest(factors: Factors, r: int) -> Factors:
    """Return the factors of a rank whose ΔW is nearest, in the Frobenius norm.

    A convolution of several groups is approached group by group, as its B has no place for more; its rank is
    rounded down to a multiple of them, and at least 1 each.

    Args:
        factors: What to approach.
        r: Rank, at least 1. What ΔW has not got is filled up with zeros.

    Returns:
        Folded factors with a scale of 1, in float32 at least; A and B share the roots of the singular values.

    Raises:
        AdapterError: If there is a magnitude.
        UsageError: If ``r`` is below 1.
    """
    if r < 1:
        raise UsageError(f"A rank must be at least 1; found {r}.")
    factors.require_no_magnitude()
    dtype = torch.promote_types(factors.A.dtype, torch.float32)
    wide = factors.at_least(torch.float64).fold()
    groups = wide.form.groups
    part = max(1, r // groups)
    rows, columns = wide.B.shape[0] // groups, wide.r // groups
    As, Bs = [], []
    for g in range(groups):
        B = wide.scale * wide.B[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns]
        Q_left, R_left = torch.linalg.qr(B)  # (rows, k), (k, columns)
        Q_right, R_right = torch.linalg.qr(wide.A[g * columns : (g + 1) * columns].T)
        U, S, Vh = torch.linalg.svd(R_left @ R_right.T, full_matrices=False)
        root = S[:part].sqrt()
        As.append(_taller(root[:, None] * (Vh[:part] @ Q_right.T), part))  # (part, in)
        Bs.append(_taller(((Q_left @ U[:, :part]) * root).T, part).T)  # (rows, part)
    A = torch.cat(As).to(dtype)
    B = torch.block_diag(*Bs).to(dtype)  # type: ignore[no-untyped-call]
    bias = None if wide.bias is None else (wide.scale * wide.bias).to(dtype)
    return Factors(A, torch.eye(part * groups, dtype=dtype), B, 1.0, factors.form, bias=bias)


def pad(factors: Factors, r: int) -> Factors:
    """Raise the rank with zeros: exactly the same ΔW.

    Args:
        factors: Of a module that is not a grouped convolution.
        r: Rank, not below theirs.

    Returns:
        Factors of rank r.
    """
    M = torch.zeros(r, r, dtype=factors.M.dtype)
    M[: factors.r, : factors.r] = factors.M
    if factors.is_folded:
        M = torch.eye(r, dtype=M.dtype)
    return replace(factors, A=_taller(factors.A, r), M=M, B=_taller(factors.B.T, r).T.contiguous())


def _taller(matrix: Tensor, rows: int) -> Tensor:
    """Add rows of zeros."""
    return torch.cat([matrix, matrix.new_zeros(rows - matrix.shape[0], matrix.shape[1])])


@dataclass(frozen=True)
class Ranked:
    """An adapter brought to a rank, and what that cost.

    Attributes:
        adapter: The adapter.
        errors: ``‖ΔW - ΔW'‖ / ‖ΔW‖`` by module, Frobenius norms in float64.
        overall: The same over all modules together.
    """

    adapter: Adapter
    errors: Mapping[str, float]
    overall: float


def to_rank(adapter: Adapter, r: int) -> Ranked:
    """Bring every module of an adapter to a rank.

    Args:
        adapter: The adapter.
        r: Rank, at least 1.

    Returns:
        The nearest adapter of that rank, with its errors.

    Raises:
        AdapterError: If it has DoRA's magnitude.
        UsageError: If ``r`` is below 1.
    """
    adapter.refuse_magnitudes(
        "What another rank would cost depends on the base's weights, so --rank is not done"
    )
    modules = {name: nearest(factors, r) for name, factors in adapter.modules.items()}
    errors = {
        name: distance(Adapter({name: factors}), Adapter({name: modules[name]})).max_relative_error
        for name, factors in adapter.modules.items()
    }
    norms = {name: factors.norm() for name, factors in adapter.modules.items()}
    whole = math.hypot(*norms.values())
    lost = math.hypot(*(error * norms[name] for name, error in errors.items() if norms[name]))
    return Ranked(replace(adapter, modules=modules), errors, lost / whole if whole else 0.0)
