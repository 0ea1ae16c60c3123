"""Convolutions: torch's classes, and B of grouped ones, which files hold without the zeros between groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["CONVOLUTIONS", "join_groups", "split_groups"]

# By the number of dimensions of the kernel.
CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def join_groups(B: Tensor, groups: int) -> Tensor:
    """Return B as a matrix over all ranks: block-diagonal, one block per group.

    Args:
        B: Shape ``(out, r / groups)``.
        groups: Groups of the convolution.

    Returns:
        Shape ``(out, r)``.
    """
    if groups == 1:
        return B
    joined: Tensor = torch.block_diag(*B.chunk(groups))  # type: ignore[no-untyped-call]
    return joined


def split_groups(B: Tensor, groups: int) -> Tensor:
    """Return B as files hold it: the inverse of ``join_groups``.

    Args:
        B: Shape ``(out, r)``, block-diagonal.
        groups: Groups of the convolution.

    Returns:
        Shape ``(out, r / groups)``.
    """
    if groups == 1:
        return B
    blocks = B.view(groups, B.shape[0] // groups, groups, B.shape[1] // groups)
    return torch.cat([blocks[g, :, g] for g in range(groups)])
