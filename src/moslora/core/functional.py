"""The MoSLoRA update as pure functions: the oracle that every other path is tested against.

ΔW = s·B·M·A    A: (r, in)    M: (r, r)    B: (out, r)    s = alpha / r    (arXiv:2406.11909, eq. 5)

Split A by rows and B by columns into r rank-1 subspaces. LoRA adds r pairs, ``Σ_i b_i·a_i``; a mixer adds
all r² pairs with weights, ``Σ_ij M_ij·b_i·a_j``. LoRA is the case ``M = I``. Because ``M·A`` has the shape of
A, a trained mixer folds into it exactly: what is shipped is an ordinary LoRA of the same rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "concatenate",
    "delta_weight",
    "fold",
    "low_rank_update",
    "scaling",
    "subtract_start",
    "two_subspace_mixer",
    "two_subspace_update",
]


def scaling(alpha: float, r: int, use_rslora: bool = False) -> float:
    """Return the factor s of the update.

    Args:
        alpha: ``lora_alpha``, unitless.
        r: Rank, at least 1.
        use_rslora: Divide by ``sqrt(r)`` (arXiv:2312.03732) in place of ``r``.

    Returns:
        ``alpha / r``, or ``alpha / sqrt(r)``.

    Raises:
        ValueError: If ``r`` is below 1.
    """
    if r < 1:
        raise ValueError(f"r={r!r} is not a rank; it must be an integer of at least 1.")
    return alpha / r**0.5 if use_rslora else alpha / r


def check_factors(A: Tensor, M: Tensor, B: Tensor) -> None:
    """Check that three factors fit together.

    Args:
        A, M, B: Factors, shapes ``(r, in)``, ``(r, r)``, ``(out, r)``.

    Raises:
        ValueError: If a factor is not a matrix, or the inner sizes disagree.
    """
    if A.ndim != 2 or M.ndim != 2 or B.ndim != 2 or M.shape != (A.shape[0],) * 2 or B.shape[1] != A.shape[0]:
        raise ValueError(
            "The factors do not fit together: expected A (r, in), M (r, r), B (out, r); "
            f"found A {tuple(A.shape)}, M {tuple(M.shape)}, B {tuple(B.shape)}."
        )


def low_rank_update(x: Tensor, A: Tensor, M: Tensor, B: Tensor, scale: float) -> Tensor:
    """Apply the update to ``x`` without building ΔW.

    Args:
        x: Input, shape ``(..., in)``, any float dtype.
        A, M, B: Factors, shapes ``(r, in)``, ``(r, r)``, ``(out, r)``, one dtype.
        scale: ``alpha / r``, unitless.

    Returns:
        ``scale · x Aᵀ Mᵀ Bᵀ``, shape ``(..., out)``, dtype of ``x``.

    Raises:
        ValueError: If the inner sizes disagree.
    """
    check_factors(A, M, B)
    if x.shape[-1] != A.shape[1]:
        raise ValueError(f"x has {x.shape[-1]} features, but A {tuple(A.shape)} takes {A.shape[1]}.")
    H = x.to(A.dtype) @ A.T  # (..., r)
    H2 = H @ M.T  # (..., r)
    return (scale * (H2 @ B.T)).to(x.dtype)  # (..., out)


def delta_weight(A: Tensor, M: Tensor, B: Tensor, scale: float) -> Tensor:
    """Build ΔW.

    Args:
        A, M, B: Factors, shapes ``(r, in)``, ``(r, r)``, ``(out, r)``, one dtype.
        scale: ``alpha / r``, unitless.

    Returns:
        ``scale · B M A``, shape ``(out, in)``, dtype of the factors.

    Raises:
        ValueError: If the inner sizes disagree.
    """
    check_factors(A, M, B)
    return scale * (B @ (M @ A))  # (out, in)


def fold(A: Tensor, M: Tensor) -> Tensor:
    """Fold the mixer into A: what is left is an ordinary LoRA of the same rank, B and s unchanged.

    The product is taken in float64 and rounded once, so that nothing but the last bit of each entry is lost.

    Args:
        A, M: Factors, shapes ``(r, in)`` and ``(r, r)``, any float dtype.

    Returns:
        ``A' = M·A``, shape ``(r, in)``, dtype of ``A``.

    Raises:
        ValueError: If the inner sizes disagree.
    """
    if A.ndim != 2 or M.shape != (A.shape[0],) * 2:
        raise ValueError(
            f"Cannot fold: expected A (r, in) and M (r, r); found A {tuple(A.shape)}, M {tuple(M.shape)}."
        )
    return (M.double() @ A.double()).to(A.dtype)  # (r, in)


def two_subspace_update(x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Apply the paper's explicit two-subspace mixing (arXiv:2406.11909, eq. 2).

    ``A = [A1; A2]`` and ``B = [B1, B2]`` are split into halves; LoRA adds ``B1·A1 + B2·A2``, this adds all
    four pairs, ``(B1 + B2)(A1 + A2)``.

    Args:
        x: Input, shape ``(..., in)``, any float dtype.
        A, B: Factors, shapes ``(r, in)`` and ``(out, r)``, one dtype, r even.
        scale: ``alpha / r``, unitless.

    Returns:
        ``scale · x (A1 + A2)ᵀ (B1 + B2)ᵀ``, shape ``(..., out)``, dtype of ``x``.

    Raises:
        ValueError: If r is odd, or the inner sizes disagree.
    """
    r = A.shape[0]
    if r % 2 or B.shape[1] != r:
        raise ValueError(
            "Two-subspace mixing splits A (r, in) and B (out, r) into halves, so both need the same even r; "
            f"found A {tuple(A.shape)}, B {tuple(B.shape)}."
        )
    A1, A2 = A.chunk(2, dim=0)  # (r/2, in) each
    B1, B2 = B.chunk(2, dim=1)  # (out, r/2) each
    return (scale * (x.to(A.dtype) @ (A1 + A2).T @ (B1 + B2).T)).to(x.dtype)  # (..., out)


def two_subspace_mixer(r: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the fixed mixer that equals explicit two-subspace mixing, ``[[I, I], [I, I]]``.

    Args:
        r: Rank, even. The mixer itself has rank r/2.
        dtype: Dtype of the result.

    Returns:
        The mixer, shape ``(r, r)``.

    Raises:
        ValueError: If r is odd.
    """
    if r < 2 or r % 2:
        raise ValueError(
            f'mixer="two-subspace" needs an even rank, because it mixes two halves; found r={r}.'
        )
    return torch.eye(r // 2, dtype=dtype).repeat(2, 2)  # (r, r)


def concatenate(parts: Sequence[tuple[float, Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Lay factors side by side, so that their ΔW add up.

    A sum of products is not a product of sums: adding A to A and B to B gives another ΔW. Exact is

        Σ w_i·B_i·M_i·A_i = [w_1·B_1, …] · blockdiag(M_1, …) · [A_1; …]

    Args:
        parts: Per summand a weight, and A ``(r_i, in)``, M ``(r_i, r_i)``, B ``(out, r_i)``.

    Returns:
        A ``(Σr_i, in)``, M ``(Σr_i, Σr_i)`` and B ``(out, Σr_i)``.
    """
    A = torch.cat([A for _, A, _, _ in parts])
    M = torch.block_diag(*(M for _, _, M, _ in parts))  # type: ignore[no-untyped-call]
    B = torch.cat([weight * B for weight, _, _, B in parts], dim=1)
    return A, M, B


def subtract_start(
    factors: tuple[Tensor, Tensor, Tensor], start: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return factors of the difference of two products that may be nearly equal.

    Two products subtracted as they are would leave their rounding; so the differences are taken of the factors:

        B·M·A - B0·M0·A0 = [B - B0, B0] · blockdiag(M, I) · [A; (M - M0)·A + M0·(A - A0)]

    Args:
        factors: A ``(r, in)``, M ``(r, r)`` and B ``(out, r)``.
        start: A0, M0 and B0, of the same shapes and dtype.

    Returns:
        Shapes ``(2r, in)``, ``(2r, 2r)`` and ``(out, 2r)``; a product of exactly zero if nothing has moved.

    Raises:
        ValueError: If the shapes disagree.
    """
    for one, other in zip(factors, start, strict=True):
        if one.shape != other.shape:
            raise ValueError(
                f"A start of shape {tuple(other.shape)} does not fit a factor of shape {tuple(one.shape)}."
            )
    (A, M, B), (A0, M0, B0) = factors, start
    check_factors(A, M, B)
    moved = (M - M0) @ A + M0 @ (A - A0)  # (r, in)
    identity = torch.eye(len(M), dtype=M.dtype, device=M.device)
    mixers = torch.block_diag(M, identity)  # type: ignore[no-untyped-call]  # (2r, 2r)
    return torch.cat([A, moved]), mixers, torch.cat([B - B0, B0], dim=1)
