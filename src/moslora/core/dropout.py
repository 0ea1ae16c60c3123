"""Dropout by position: draw which entries are dropped, instead of a mask of all.

Drawing a mask is what dropout costs on a CPU. Here only the gaps between dropped entries are drawn, p of the numbers,
and only the positions are kept for the backward pass, a fifth of a byte mask at p = 0.05.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["draw_dropped", "why_no_dropout_by_mask", "why_no_dropout_by_position", "without"]

# Above this share of dropped entries their positions, 4 bytes each, are more to keep than a byte mask of all.
LARGEST_SPARSE_DROPOUT = 0.25


def why_no_dropout_by_position(x: Tensor, p: float) -> str | None:
    """Tell why entries of ``x`` cannot be dropped by drawing their positions; None if they can.

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


def why_no_dropout_by_mask(p: float) -> str | None:
    """Tell why entries cannot be dropped by a mask that torch draws; None if they can.

    Args:
        p: Probability with which an entry is dropped.

    Returns:
        The reason, in words.
    """
    if p >= 1:
        return f"dropout {p:g} drops everything"
    if torch.compiler.is_compiling():
        return "dropout changes the update's input, which the compiler sees better from outside"
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
    batches, start = [], 0
    while start < numel:
        left = numel - start
        # Six standard deviations more than expected: a second turn is needed once in a billion.
        count = int(left * p + 6 * math.sqrt(left * p) + 16)
        gaps = torch.rand(count).neg_().log1p_().mul_(1 / math.log1p(-p))
        gaps.clamp_(max=left)  # a tiny p could give a gap above int64's largest; the conversion is the floor
        positions = gaps.to(torch.int64).add_(1).cumsum(0).add_(start - 1)
        batches.append(positions)
        start = int(positions[-1]) + 1
    if not batches:
        return torch.empty(0, dtype=torch.int64)
    drawn = batches[0] if len(batches) == 1 else torch.cat(batches)
    return drawn[: int(torch.searchsorted(drawn, numel))]


def without(x: Tensor, dropped: Tensor | None) -> Tensor:
    """Return ``x`` with the dropped entries at zero.

    Args:
        x: Any shape.
        dropped: Positions in the flattened ``x``; None drops nothing.
    """
    return x if dropped is None else x.flatten().index_fill(0, dropped.long(), 0).view_as(x)
