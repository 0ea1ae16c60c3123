"""The leading singular triples of a weight, by as few products with it as the error allows.

A block Krylov method (Musco and Musco, arXiv:1504.05477): ``W·Wᵀ`` is applied again and again to a random block, and
the triples are read off what all the blocks span together. What is found is the *exact* decomposition of a weight that
differs from W by the residual ``W·V - U·Σ``, which one more product measures. Trained weights, whose spectra fall, take
a few hundred dimensions; so do random ones, a few more.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["ALLOWED", "principal_components"]

ALLOWED = 1e-4  # of the components' norm; rounding a weight to bfloat16 changes it by 2e-3
SPARE = 8  # columns of a block beyond r
FIRST_LOOK, NEXT_LOOK = 4, 1.5  # blocks before the first look, and growth from one to the next
LEAST = 16  # blocks that a weight must have room for; below, the whole decomposition costs as little
MOST = 0.5  # of the weight's smaller side that the blocks may span together
SEED = 0


def principal_components(weight: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return the leading singular triples of a weight.

    The result depends on the weight alone: the random block is drawn from a generator of its own.

    Args:
        weight: Shape ``(out, in)``, float32 or float64.
        r: How many, at most the smaller side.

    Returns:
        U, shape ``(out, r)``; the values, shape ``(r,)``, largest first; Vᵀ, shape ``(r, in)``; and by how much the
        weight that they belong to differs from this one, of the norm of the components: at most ``ALLOWED``. Where
        that was not reached, or the weight is small, torch's whole decomposition is taken, whose residual is 0 here.
    """
    if min(weight.shape) >= LEAST * (r + SPARE):
        found = _by_blocks(weight, r)
        if found is not None:
            return found
    U, values, Vh = torch.linalg.svd(weight, full_matrices=False)
    return U[:, :r], values[:r], Vh[:r], 0.0


def _by_blocks(weight: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor, float] | None:
    """Return triples of a small enough residual, or None."""
    columns, most = r + SPARE, int(MOST * min(weight.shape))
    drawn = torch.randn(weight.shape[1], columns, generator=torch.Generator().manual_seed(SEED))
    block = weight @ drawn.to(weight)  # (out, columns)
    basis, images = weight.new_empty(len(weight), most), weight.new_empty(weight.shape[1], most)
    look, blocks = FIRST_LOOK, most // columns
    for number in range(1, blocks + 1):
        spanned, end = basis[:, : (number - 1) * columns], number * columns
        for _ in range(
            2
        ):  # once leaves the rounding of what was taken away, which is all there is at full rank
            block = torch.linalg.qr(block - spanned @ (spanned.T @ block)).Q
        basis[:, end - columns : end] = block
        images[:, end - columns : end] = image = weight.T @ block  # (in, columns)
        if number in (look, blocks):
            found = _read_off(weight, basis[:, :end], images[:, :end], r)
            if found[3] <= ALLOWED:
                return found
            look = math.ceil(NEXT_LOOK * number)
        block = weight @ image
    return None


def _read_off(weight: Tensor, basis: Tensor, images: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return the triples of the weight as the basis sees it, and their residual."""
    squares, vectors = torch.linalg.eigh((images.T @ images).cpu().double())  # not every device has float64
    values = squares[-r:].flip(0).clamp(min=0).sqrt().to(weight)
    turned = vectors[:, -r:].flip(1).to(weight)
    U, V = basis @ turned, images @ turned / values
    residual = float((weight @ V - U * values).norm() / values.norm())
    return U, values, V.T, residual
