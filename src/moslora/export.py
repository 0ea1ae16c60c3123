"""Export: write an adapter in another format and prove it by reading back what was written."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moslora.adapter import Adapter, compare
from moslora.formats import FORMATS, WRITTEN, detect
from moslora.formats.directory import staged

__all__ = ["FOLD_TOLERANCE", "ExportProof", "ProofError", "export_adapter"]

# A and B are each rounded to float32 once, 6e-8 per entry at most; a dropped mixer or scale costs about 1.
FOLD_TOLERANCE = 1e-6

PROOF_FILE = "moslora_proof.json"


class ProofError(RuntimeError):
    """What was written does not say the same as what was read. Nothing is left of it."""


@dataclass(frozen=True)
class ExportProof:
    """What an export measured on the files it wrote.

    Attributes:
        source: Format that was read.
        target: Format that was written.
        modules: How many modules both have.
        max_relative_error: Largest relative error of ΔW over them, Frobenius, float64.
        worst_module: Where it is.
        tolerance: What it was held against.
    """

    source: str
    target: str
    modules: int
    max_relative_error: float
    worst_module: str
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is a number within the tolerance."""
        return self.max_relative_error <= self.tolerance


def export_adapter(source: str | Path, out: str | Path, to: str = "lora") -> ExportProof:
    """Write an adapter in another format, and prove it.

    Args:
        source: Adapter directory of any format that is read.
        out: Directory to write; must not exist yet, or be empty.
        to: One of ``WRITTEN``. All but ``"native"`` fold the mixers.

    Returns:
        What was measured; it is kept beside the adapter as ``moslora_proof.json``.

    Raises:
        AdapterError: If the source cannot be read or trusted.
        FileExistsError: If something lies at ``out`` already.
        ProofError: If the proof failed; nothing is left at ``out``.
    """
    source = Path(source)
    found = detect(source)
    adapter = FORMATS[found].read(source)
    write = FORMATS[to].write
    if write is None:
        raise ValueError(f"The format {to} is only read; choose one of {', '.join(WRITTEN)}.")
    with staged(Path(out)) as folder:
        write(adapter, folder)
        proof = _prove(adapter, FORMATS[to].read(folder), found, to)
        if not proof.passed:
            raise ProofError(
                f"The proof failed: ΔW of {proof.worst_module} has a relative error of "
                f"{proof.max_relative_error:.1e}, above {proof.tolerance:.0e}. Nothing was left at {out}."
            )
        (folder / PROOF_FILE).write_text(json.dumps(asdict(proof), indent=2) + "\n", encoding="utf-8")
    return proof


def _equal(one: Any, two: Any) -> bool:
    """Compare two tensors, None standing for one that is missing."""
    import torch

    return one is not None and two is not None and one.dtype == two.dtype and torch.equal(one, two)


def _prove(adapter: Adapter, written: Adapter, source: str, target: str) -> ExportProof:
    found = compare(adapter, written)
    names = adapter.extra.keys() | written.extra.keys()
    changed = sorted(n for n in names if not _equal(adapter.extra.get(n), written.extra.get(n)))
    if changed:
        raise ProofError(f"Tensors beside the factors were lost or changed: {changed[:5]}. Nothing was left.")
    return ExportProof(
        source, target, found.modules, found.max_relative_error, found.worst_module, FOLD_TOLERANCE
    )
