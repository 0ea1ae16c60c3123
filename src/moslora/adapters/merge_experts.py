"""Where ΔW of experts goes in a checkpoint: into a tensor of each projection of each, or a slice of one of all."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from moslora.adapters.expert_layouts import (
    LAYOUTS,
    ExpertLayout,
    expert_count,
    put_together,
    take_apart,
)
from moslora.adapters.formats.experts import EXPERT, PLACE
from moslora.adapters.merge_blocks import Change
from moslora.errors import ModelError
from moslora.models.shards import DTYPES, Stored, StoredWeights

if TYPE_CHECKING:
    from moslora.adapters.factors import Adapter, Factors

__all__ = ["expert_changes", "expert_paths"]

WAY_OUT = "Load the adapter with PeftModel.from_pretrained, call merge_and_unload() and save the model."


def expert_paths(adapter: Adapter, kind: object) -> frozenset[str]:
    """Return the modules of an adapter that are experts, in either form.

    Args:
        adapter: The adapter.
        kind: The base's ``model_type``.
    """
    layout = LAYOUTS.get(str(kind))
    pattern = None if layout is None else layout.pattern()
    return frozenset(
        path
        for path, factors in adapter.modules.items()
        if factors.form == EXPERT or (pattern is not None and pattern.fullmatch(path))
    )


def expert_changes(adapter: Adapter, weights: StoredWeights) -> list[Change]:
    """Find the place of every expert's ΔW in the base's files.

    Args:
        adapter: Its experts, in either form, and nothing else.
        weights: The base's, fused (one tensor of all experts) or not.

    Returns:
        The changes; nothing is read or written.

    Raises:
        ModelError: If the family's layout is not known, or a tensor is missing or of another size.
    """
    layout = LAYOUTS.get(str(weights.config.get("model_type")))
    if layout is None:
        first = next(iter(adapter.modules))
        raise ModelError(
            f"{first} is one of several experts in a tensor, whose place only the model's own code knows. {WAY_OUT}"
        )
    fused = {name for name in weights.table if name.endswith(f"{layout.together}.gate_up_proj")}
    if fused:
        together = put_together(adapter, layout, expert_count(weights.config))
        return [
            change
            for path, factors in together.modules.items()
            if not factors.is_zero()
            for change in [_in_fused(path, factors, layout, weights)]
        ]
    return list(_in_single(take_apart(adapter, layout), weights))


def _in_single(adapter: Adapter, weights: StoredWeights) -> Iterator[Change]:
    for path, factors in adapter.modules.items():
        stored = weights.table.get(f"{path}.weight")
        shape = (factors.B.shape[0], factors.A.shape[1])
        if stored is None:
            raise ModelError(
                f"The base has no {path}.weight on disk. Name a base that is complete. Or: {WAY_OUT}"
            )
        if stored.shape != shape:
            raise ModelError(
                f"{path}: the adapter changes a weight of (out, in) {shape}, the base's is {stored.shape}."
            )
        _check(path, stored)
        if not factors.is_zero():
            yield Change(path, stored, factors.B, factors.M, factors.A, factors.scale)


def _in_fused(path: str, factors: Factors, layout: ExpertLayout, weights: StoredWeights) -> Change:
    place = PLACE.fullmatch(path)
    assert place, "an expert's path says which it is"
    owner, index = place[1], int(place[2])
    parameter = "gate_up_proj" if owner.endswith(".base_layer") else "down_proj"
    name = f"{owner.removesuffix('.base_layer')}.{parameter}"
    stored = weights.table.get(name)
    out, inner = factors.B.shape[0], factors.A.shape[1]
    shape = (
        (inner, out) if layout.interleaved else (out, inner)
    )  # gpt-oss has both: (in, out), and rows in turn
    if stored is None or len(stored.shape) != 3 or stored.shape[1:] != shape or index >= stored.shape[0]:
        found = "missing" if stored is None else f"of shape {stored.shape}"
        raise ModelError(f"{name} is {found} in the base; an expert of the adapter is {shape}. {WAY_OUT}")
    _check(name, stored)
    size = math.prod(shape) * _width(stored)
    part = replace(stored, shape=shape, start=stored.start + index * size)
    A, M, B = factors.A, factors.M, factors.B
    sides = (A.T, M.T, B.T) if layout.interleaved else (B, M, A)
    return Change(f"{name}[{index}]", part, *sides, factors.scale)


def _check(name: str, stored: Stored) -> None:
    if stored.dtype not in DTYPES:
        raise ModelError(
            f"{name} is stored as {stored.dtype}; weights of {', '.join(DTYPES)} can be merged into. Take the base in "
            "16 or 32 bits and quantize the result."
        )


def _width(stored: Stored) -> int:
    return int(stored.dtype.removeprefix("BF").removeprefix("F")) // 8
