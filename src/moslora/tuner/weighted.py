"""Weighted sums of adapters, exact on ΔW.

Factors are laid side by side, or the nearest sum of a rank is taken; never are factors added to factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moslora.adapter import Factors
from moslora.functional import concatenate
from moslora.ranks import nearest

__all__ = ["COMBINATIONS", "Combined", "combine"]


@dataclass(frozen=True)
class Combined:
    """The factors of a sum in one layer; its scale is 1.

    Attributes:
        A: Shape ``(r, in)``.
        M: Shape ``(r, r)``.
        B: Shape ``(out, r)``.
    """

    A: Tensor
    M: Tensor
    B: Tensor


def _side_by_side(parts: Sequence[tuple[float, Tensor, Tensor, Tensor]], rank: int | None) -> Combined:
    """Concatenate: exact, and the ranks add up."""
    return Combined(*concatenate(parts))


def _nearest(parts: Sequence[tuple[float, Tensor, Tensor, Tensor]], rank: int | None) -> Combined:
    """Take the nearest ΔW of a rank, by the singular values of the exact sum."""
    A, M, B = concatenate([(w, A.double().cpu(), M.double().cpu(), B.double().cpu()) for w, A, M, B in parts])
    r = min(A.shape[0], A.shape[1], B.shape[0])
    found = nearest(Factors(A, M, B, 1.0), min(rank or r, r))
    like = parts[0][1]
    return Combined(*(t.to(like.device, like.dtype) for t in (found.A, found.M, found.B)))


# PEFT's names. What it calls "linear" adds factors, so here it is the exact sum that the name promises.
COMBINATIONS: dict[str, Callable[[Sequence[tuple[float, Tensor, Tensor, Tensor]], int | None], Combined]] = {
    "cat": _side_by_side,
    "linear": _side_by_side,
    "svd": _nearest,
}


@torch.no_grad()
def combine(
    layers: Mapping[str, Any],
    adapters: Sequence[str],
    weights: Sequence[float],
    combination_type: str,
    svd_rank: int | None,
) -> dict[str, Combined]:
    """Sum the ΔW of adapters in every layer.

    Args:
        layers: Adapted layers by their path.
        adapters: Names of adapters; a layer without one has no part of it.
        weights: A factor for each, unitless.
        combination_type: A key of ``COMBINATIONS``.
        svd_rank: Rank for ``"svd"``; the largest of the adapters' if None.

    Returns:
        Factors by the layer's path, for the layers that have any of the adapters.

    Raises:
        ValueError: If the arguments make no sense together.
    """
    if combination_type not in COMBINATIONS:
        raise ValueError(
            f"combination_type={combination_type!r} is unknown; choose one of {sorted(COMBINATIONS)}. (Ties, DARE "
            "and the like work on factors, which is not the sum of what the adapters do.)"
        )
    if not adapters or len(adapters) != len(weights):
        raise ValueError(
            f"{len(adapters)} adapters and {len(weights)} weights; give a weight for each, and some."
        )
    bad = [weight for weight in weights if not math.isfinite(weight)]
    if bad:
        raise ValueError(f"weights has {bad[0]!r}, which is no finite number.")
    if svd_rank is not None and (combination_type != "svd" or svd_rank < 1):
        raise ValueError(f'svd_rank={svd_rank} needs combination_type="svd" and a rank of at least 1.')
    found: dict[str, Combined] = {}
    for name, layer in layers.items():
        parts = []
        for adapter, weight in zip(adapters, weights, strict=True):
            if adapter in layer.scaling:
                A, M, B, scale = layer.factors(adapter)
                parts.append((weight * scale, A, M, B))
        if parts:
            rank = svd_rank or max(A.shape[0] for _, A, _, _ in parts)
            found[name] = COMBINATIONS[combination_type](parts, rank)
    return found
