"""Combine: the weighted sum of adapters as one adapter, exact on ΔW and proven on what was written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moslora.adapters.arithmetic import add, relative, sum_error
from moslora.adapters.cards.card import Card
from moslora.adapters.export import check_format, named_for_base, written
from moslora.adapters.factors import Factors
from moslora.adapters.facts import to_say
from moslora.adapters.formats.reading import read_adapter
from moslora.adapters.ranks import to_rank
from moslora.errors import AdapterError, ProofError

__all__ = ["CombineProof", "combine"]


@dataclass(frozen=True)
class CombineProof:
    """What combining measured on the files it wrote.

    Attributes:
        weights: What each adapter was multiplied by, in the order given.
        modules: How many modules the sum has.
        rank: Largest rank of a module.
        max_relative_error: Largest ``‖ΔW - Σ w·ΔW‖`` over the modules, relative to ``Σ ‖w·ΔW‖``; float64. Of biases on
            B, where there are any, likewise.
        worst_module: Where it is.
        tolerance: What it was held against.
        reader: Whose reader read it back.
        rank_error: ``‖ΔW - ΔW'‖ / ‖ΔW‖`` that a change of rank cost, over all modules; None if there was none.
        starts: How starts were found that the adapters do not hold (PiSSA, OLoRA), in the order given; empty texts
            for the others.
        notes: What was put right in names, what does not fit the base, and what must be known of each adapter
            (``facts.to_say``), as sentences.
    """

    weights: tuple[float, ...]
    modules: int
    rank: int
    max_relative_error: float
    worst_module: str
    tolerance: float
    reader: str = "moslora"
    rank_error: float | None = None
    starts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def combine(
    adapters: Sequence[str | Path],
    weights: Sequence[float],
    out: str | Path,
    to: str = "lora",
    *,
    rank: int | None = None,
    dtype: str | None = None,
    base: str | None = None,
) -> CombineProof:
    """Write the weighted sum of adapters.

    Args:
        adapters: Adapters of any format that is read, for one base.
        weights: A factor for each, unitless; may be negative.
        out: Directory to write, or file where the format is a single one; must not exist yet.
        to: A format that is written.
        rank: Bring every module of the sum to this rank, by its singular values; None keeps it exact.
        dtype: A key of ``export.TOLERANCES``; None for float32.
        base: Base model, for formats that need its configuration; None for the one the adapters name.

    Returns:
        What was measured; where a directory is written it is kept there as ``moslora_proof.json``.

    Raises:
        AdapterError: If an adapter cannot be read, or they cannot be added.
        ExistsError: If something exists at ``out`` already.
        ProofError: If the proof failed; nothing is left at ``out``.
        UsageError: If the format is not written.
    """
    check_format(to)
    read = [named_for_base(read_adapter(path, base=base), to, base) for path in adapters]
    parts = [part for part, _, _ in read]
    of_names = dict.fromkeys(note for _, _, own in read for note in own)
    notes = (
        *of_names,
        *(f"{path}: {note}" for path, part in zip(adapters, parts, strict=True) for note in to_say(part)),
    )
    whole = add(parts, weights)
    ranked = to_rank(whole, rank) if rank is not None else None
    if not whole.modules:
        raise AdapterError("The adapters have no modules, so there is nothing to combine.")
    wanted = whole if ranked is None else ranked.adapter
    with written(wanted, Path(out), to, dtype, base) as result:
        if result.adapter.modules.keys() != whole.modules.keys():
            lost = sorted(whole.modules.keys() ^ result.adapter.modules.keys())
            raise ProofError(
                f"The proof failed: {len(lost)} modules were lost or added on the way, as {lost[0]}. Nothing was "
                f"left at {out}."
            )
        worst, worst_module = -1.0, ""
        for name, factors in result.adapter.modules.items():
            # Against the sources, not against the sum that was written. After a change of rank the sum is what it was
            # brought to, whose distance from the sources is stated beside.
            summands = [
                (w, p.modules[name]) for w, p in zip(weights, parts, strict=True) if name in p.modules
            ]
            if ranked is not None:
                summands = [(1.0, ranked.adapter.modules[name])]
            errors = (sum_error(name, factors, summands), _bias_error(factors, summands))
            error = math.nan if any(map(math.isnan, errors)) else max(errors)
            if not (error <= worst or math.isnan(worst)):  # NaN counts as worse than anything
                worst, worst_module = error, name
        proof = CombineProof(
            tuple(float(weight) for weight in weights),
            len(result.adapter.modules),
            max(factors.r for factors in result.adapter.modules.values()),
            worst,
            worst_module,
            result.tolerance,
            result.reader,
            None if ranked is None else ranked.overall,
            tuple(str(part.begun or "") for part in parts),
            notes,
        )
        if not worst <= result.tolerance:
            raise ProofError(
                f"The proof failed: ΔW of {worst_module} differs from the sum by {worst:.1e}, above "
                f"{result.tolerance:.0e}. Nothing was left at {out}."
            )
        result.keep(proof)
        weighted = ", ".join(f"{weight:g}" for weight in proof.weights)
        proven = (
            f"Largest relative error of ΔW against the sum {worst:.1e} over {proof.modules} modules, at most "
            f"{proof.tolerance:.2g} allowed, in float64 on the written file; read back by {proof.reader}."
        )
        summed = f"It is the weighted sum of {len(parts)} adapters (weights {weighted}), and was not measured as such."
        result.describe(Card(Path(out).name, to, wanted, proofs=[proven], origin=summed))
    return proof


def _bias_error(written: Factors, summands: Sequence[tuple[float, Factors]]) -> float:
    """Return ``‖b - Σ w·b‖ / Σ ‖w·b‖`` of what biases on B add to the output, in float64."""
    biases = [weight * _scaled_bias(part) for weight, part in summands]
    difference = _scaled_bias(written) - torch.stack(biases).sum(0)
    return relative(float(difference.norm()), sum(float(bias.norm()) for bias in biases))


def _scaled_bias(factors: Factors) -> Tensor:
    """Return what a bias on B adds to the output; zero where there is none."""
    if factors.bias is None:
        return factors.B.new_zeros(len(factors.B)).double()
    return factors.scale * factors.bias.double()
