"""Weighted sums of adapters, on ΔW.

Factors are concatenated, or the nearest sum of a rank is taken. Factors are never added to factors, which would not
give the sum of what the adapters do. Ties, DARE and pruning by magnitude choose among the entries of each ΔW, so their
results are of full rank, and the nearest matrix of a rank stands for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge
from torch import Tensor

from moslora.adapters.factors import Factors
from moslora.adapters.ranks import nearest
from moslora.compat.peft.functions import prune
from moslora.core.functional import concatenate, delta_weight
from moslora.errors import UsageError
from moslora.tuner.config import MoSLoRAConfig
from moslora.tuner.experts import ParamWrapper
from moslora.tuner.layer import MoSLoRALayer

__all__ = [
    "COMBINATIONS",
    "REFUSED_IN_SUMS",
    "Combination",
    "Combined",
    "How",
    "check_summable",
    "combine_factors",
]

WeightedFactors = tuple[float, float, Tensor, Tensor, Tensor]  # weight, scale, A, M, B


@dataclass(frozen=True)
class Combined:
    """The factors of a sum in one layer; its scale is 1.

    Attributes:
        A: Shape ``(r, in)``.
        M: Shape ``(r, r)``.
        B: Shape ``(out, r)``.
        bias: On B, shape ``(out,)``; None where no summand has one.
    """

    A: Tensor
    M: Tensor
    B: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Combination:
    """A way to sum.

    Attributes:
        is_exact: Whether nothing is lost, and the ranks add up. Else the nearest of a rank is taken.
        pruning: What entries of each ΔW are kept, if not all: the largest, or any, in which case they are rescaled.
        elects_signs: Whether entries whose sign is not the majority's are left out, and the others averaged.
    """

    is_exact: bool = False
    pruning: Literal["magnitude", "random"] | None = None
    elects_signs: bool = False


# PEFT's names. What it calls "linear" adds factors, so here it is the exact sum that the name promises; and what it
# does to factors without "_svd" is done to ΔW with or without.
PRUNED = {
    "magnitude_prune": Combination(pruning="magnitude"),
    "ties": Combination(pruning="magnitude", elects_signs=True),
    "dare_linear": Combination(pruning="random"),
    "dare_ties": Combination(pruning="random", elects_signs=True),
}
COMBINATIONS: dict[str, Combination] = {
    "cat": Combination(is_exact=True),
    "linear": Combination(is_exact=True),
    "svd": Combination(),
    **PRUNED,
    **{f"{name}_svd": combination for name, combination in PRUNED.items()},
}
REFUSED_IN_SUMS: dict[str, str] = {
    "svd_clamp": "it clips the factors, so that their product is not the nearest to the sum any more. Leave it out.",
    "svd_driver": "torch chooses it, and the result does not depend on it. Leave it out.",
}


@dataclass(frozen=True)
class How:
    """How adapters are summed.

    Attributes:
        combination_type: A key of ``COMBINATIONS``.
        svd_rank: Rank of what is nearest; the largest of the adapters' if None.
        density: Share of entries that pruning keeps, in (0, 1].
        majority_sign_method: ``"total"`` or ``"frequency"``.
    """

    combination_type: str = "cat"
    svd_rank: int | None = None
    density: float | None = None
    majority_sign_method: str = "total"

    def find(self) -> Combination:
        """Look up the way to sum.

        Raises:
            ValueError: If the arguments make no sense together; the message names the way out.
        """
        kind = self.combination_type
        if kind not in COMBINATIONS:
            raise UsageError(f"combination_type={kind!r} is unknown; choose one of {sorted(COMBINATIONS)}.")
        found = COMBINATIONS[kind]
        if self.svd_rank is not None and (found.is_exact or self.svd_rank < 1):
            raise UsageError(
                f"svd_rank={self.svd_rank} needs a combination_type that takes the nearest of a rank, as "
                '"svd" does, and to be at least 1.'
            )
        if found.pruning is None and self.density is not None:
            raise UsageError(
                f"density={self.density} needs a combination_type that prunes, one of {sorted(PRUNED)}; "
                f"{kind!r} keeps every entry."
            )
        if found.pruning is not None and not (self.density is not None and 0 < self.density <= 1):
            raise UsageError(
                f"combination_type={kind!r} needs density, the share of entries to keep, in (0, 1]; found "
                f"{self.density}."
            )
        if self.majority_sign_method not in ("total", "frequency"):
            raise UsageError(
                f"majority_sign_method={self.majority_sign_method!r} is unknown; choose 'total' or 'frequency'."
            )
        if self.majority_sign_method != "total" and not found.elects_signs:
            raise UsageError(
                f"majority_sign_method={self.majority_sign_method!r} needs a combination_type that elects signs, "
                "'ties' or 'dare_ties'."
            )
        return found


def _side_by_side(parts: Sequence[WeightedFactors]) -> Combined:
    """Concatenate: exact, and the ranks add up."""
    return Combined(*concatenate([(weight * scale, A, M, B) for weight, scale, A, M, B in parts]))


def _nearest(parts: Sequence[WeightedFactors], rank: int) -> Combined:
    """Take the nearest ΔW of a rank, by the singular values of the exact sum."""
    A, M, B = concatenate(
        [(w * s, A.double().cpu(), M.double().cpu(), B.double().cpu()) for w, s, A, M, B in parts]
    )
    r = min(A.shape[0], A.shape[1], B.shape[0])
    found = nearest(Factors(A, M, B, 1.0), min(rank, r))
    return _like(parts, found.A, found.M, found.B)


def _like(parts: Sequence[WeightedFactors], *factors: Tensor) -> Combined:
    """Put factors where those of the adapters are, in their dtype."""
    like = parts[0][2]
    return Combined(*(t.to(like.device, like.dtype) for t in factors))


def _pruned(parts: Sequence[WeightedFactors], rank: int, combination: Combination, how: How) -> Combined:
    """Take the nearest of a rank to what is made of the entries of each ΔW."""
    W = _choose_entries(parts, combination, how)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    r = min(rank, len(S))
    root = S[:r].sqrt()
    eye = torch.eye(r, dtype=W.dtype, device=W.device)
    return _like(parts, root[:, None] * Vh[:r], eye, U[:, :r] * root)


def _choose_entries(parts: Sequence[WeightedFactors], combination: Combination, how: How) -> Tensor:
    """Prune each ΔW, elect signs if that is asked for, and sum: a matrix ``(out, in)``, float32 at least.

    As in PEFT, signs are elected before the weights are applied, and DARE rescales by ``1 / density``.
    """
    density = cast(float, how.density)
    deltas = []
    for _, scale, A, M, B in parts:
        dtype = torch.promote_types(torch.promote_types(A.dtype, M.dtype), torch.float32)
        delta = delta_weight(A.to(dtype), M.to(dtype), B.to(dtype), scale)
        if density < 1:
            delta = prune(delta, density, combination.pruning, rescale=combination.pruning == "random")
        deltas.append(delta)
    stacked = torch.stack(deltas)
    weights = torch.tensor([part[0] for part in parts], dtype=stacked.dtype, device=stacked.device)
    weighted = stacked * weights[:, None, None]
    if not combination.elects_signs:
        return weighted.sum(0)
    mask = calculate_majority_sign_mask(stacked, method=how.majority_sign_method)
    return cast(Tensor, disjoint_merge(weighted, mask))


@torch.no_grad()
def combine_factors(
    layers: Mapping[str, MoSLoRALayer], adapters: Sequence[str], weights: Sequence[float], how: How
) -> dict[str, Combined]:
    """Sum the ΔW of adapters in every layer.

    Args:
        layers: Adapted layers by their path.
        adapters: Names of adapters; a layer without one has no part of it.
        weights: A factor for each, unitless.
        how: The way to sum.

    Returns:
        Factors by the layer's path, for the layers that have any of the adapters.

    Raises:
        ValueError: If the arguments make no sense together.
    """
    combination = how.find()
    if not adapters or len(adapters) != len(weights):
        raise UsageError(
            f"{len(adapters)} adapters and {len(weights)} weights; give a weight for each, and some."
        )
    bad = [weight for weight in weights if not math.isfinite(weight)]
    if bad:
        raise UsageError(f"weights has {bad[0]!r}, which is not a finite number.")
    found: dict[str, Combined] = {}
    for name, layer in layers.items():
        parts: list[WeightedFactors] = []
        biases: list[Tensor] = []
        for adapter, weight in zip(adapters, weights, strict=True):
            if adapter in layer.scaling:
                A, M, B, scale = layer.factors(adapter)
                parts.append((weight, scale, A, M, B))
                own = layer.bias_on_B(adapter)
                biases += [] if own is None else [weight * scale * own]
        if not parts:
            continue
        if biases and combination.pruning is not None:
            raise UsageError(
                f"combination_type={how.combination_type!r} chooses among the entries of ΔW, of which a bias on B "
                '(lora_bias=True) has none. Sum such adapters with "cat" or "svd".'
            )
        rank = how.svd_rank or max(A.shape[0] for _, _, A, _, _ in parts)
        if combination.is_exact:
            summed = _side_by_side(parts)
        elif combination.pruning is None:
            summed = _nearest(parts, rank)
        else:
            summed = _pruned(parts, rank, combination, how)
        found[name] = replace(summed, bias=torch.stack(biases).sum(0)) if biases else summed
    return found


def check_summable(
    adapters: Sequence[str], configs: Mapping[str, MoSLoRAConfig], layers: Mapping[str, MoSLoRALayer]
) -> None:
    """Refuse to sum what is more than factors, or factors that cannot be concatenated.

    Args:
        adapters: Names of adapters.
        configs: Their configurations by name.
        layers: Adapted layers by their path.

    Raises:
        UsageError: With the way out.
    """
    for name in adapters:
        config = configs[name]
        if config.bias != "none" or config.modules_to_save or config.trainable_token_indices:
            raise UsageError(
                f"Adapter {name!r} trains more than factors (bias, modules_to_save or "
                "trainable_token_indices), of which a weighted sum has no meaning. Combine others."
            )
        if config.use_dora:
            raise UsageError(
                f"Adapter {name!r} has DoRA's magnitude, so its change of the weight is not a product of factors, and "
                "the sum would not be one either. Activate the adapters together (set_adapter with a list), which "
                "adds their changes exactly, or merge them."
            )
    for path, layer in layers.items():
        grouped = getattr(layer.get_base_layer(), "groups", 1) != 1
        if set(adapters) & set(layer.scaling) and (isinstance(layer, ParamWrapper) or grouped):
            raise UsageError(
                f"{path}: the factors of a {type(layer.get_base_layer()).__name__} cannot be "
                "concatenated here. Leave such modules out of the adapters, or let the adapters run together: "
                f"model.base_model.set_adapter({adapters})."
            )
