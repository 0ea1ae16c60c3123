"""Combine: the weighted sum of adapters as one adapter, exact on ΔW and proven on what was written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from moslora.adapter import add
from moslora.export import FOLD_TOLERANCE, PROOF_FILE, ProofError
from moslora.formats import FORMATS, WRITTEN, read_adapter
from moslora.formats.directory import staged

__all__ = ["CombineProof", "combine"]


@dataclass(frozen=True)
class CombineProof:
    """What combining measured on the files it wrote.

    Attributes:
        weights: What each adapter was multiplied by, in the order given.
        modules: How many modules the sum has.
        rank: Largest rank of a module.
        max_relative_error: Largest ``‖ΔW - Σ w·ΔW‖`` over the modules, relative to ``Σ ‖w·ΔW‖``; float64.
        worst_module: Where it is.
        tolerance: What it was held against.
    """

    weights: tuple[float, ...]
    modules: int
    rank: int
    max_relative_error: float
    worst_module: str
    tolerance: float


def combine(
    adapters: Sequence[str | Path], weights: Sequence[float], out: str | Path, to: str = "lora"
) -> CombineProof:
    """Write the weighted sum of adapters.

    Args:
        adapters: Adapter directories of any format that is read, for one base.
        weights: A factor for each, unitless; may be negative.
        out: Directory to write; must not exist yet, or be empty.
        to: A format that is written.

    Returns:
        What was measured; it is kept beside the adapter as ``moslora_proof.json``.

    Raises:
        AdapterError: If an adapter cannot be read, or they cannot be added.
        FileExistsError: If something lies at ``out`` already.
        ProofError: If the proof failed; nothing is left at ``out``.
        ValueError: If the format is not written.
    """
    write = FORMATS[to].write if to in FORMATS else None
    if write is None:
        raise ValueError(f"The format {to!r} cannot be written; choose one of {', '.join(WRITTEN)}.")
    parts = [read_adapter(folder) for folder in adapters]
    whole = add(parts, weights)
    with staged(Path(out)) as folder:
        write(whole, folder)
        written = FORMATS[to].read(folder)
        worst, worst_module = -1.0, ""
        for name, factors in written.modules.items():
            # Against the sources, not against the sum that was written: each ΔW on its own, subtracted here.
            left, size = factors.delta_weight(), 0.0
            for part, weight in zip(parts, weights, strict=True):
                if name in part.modules:
                    delta = weight * part.modules[name].delta_weight()
                    left -= delta
                    size += float(delta.norm())
            error = float(left.norm()) / size if size else float(left.norm())
            if not error <= worst:
                worst, worst_module = error, name
        rank = max(factors.r for factors in written.modules.values())
        numbers = tuple(float(weight) for weight in weights)
        proof = CombineProof(numbers, len(written.modules), rank, worst, worst_module, FOLD_TOLERANCE)
        if not worst <= FOLD_TOLERANCE or written.modules.keys() != whole.modules.keys():
            raise ProofError(
                f"The proof failed: ΔW of {worst_module} differs from the sum by {worst:.1e}, above "
                f"{FOLD_TOLERANCE:.0e}. Nothing was left at {out}."
            )
        (folder / PROOF_FILE).write_text(json.dumps(asdict(proof), indent=2) + "\n", encoding="utf-8")
    return proof
