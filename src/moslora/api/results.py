"""What the verbs on adapters return: where the result is, its proof, and the lines that the command prints of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.adapters.combine import CombineProof
from moslora.adapters.export import ExportProof
from moslora.adapters.findings import NOT_HELD, some
from moslora.adapters.formats.table import FORMATS
from moslora.adapters.merge import LEAST_SURVIVING, MergeProof
from moslora.display import Display, Printable
from moslora.wording import size_in_words

if TYPE_CHECKING:
    from moslora.adapters.push import Pushed

__all__ = ["CombinedAdapter", "ExportedAdapter", "MergedModel", "PushedAdapter"]


@dataclass(frozen=True, repr=False)
class ExportedAdapter(Printable):
    """An adapter written in another format.

    Attributes:
        source: What was read.
        path: What was written.
        proof: What was measured on the written files.
        alpha: The ``lora_alpha`` that the caller gave; None if the source file has it.
    """

    source: Path
    path: Path
    proof: ExportProof
    alpha: float | None = None

    def show(self, display: Display) -> None:
        """Write what was read, what was written, and the proof."""
        proof = self.proof
        alpha = "" if self.alpha is None else f", alpha {self.alpha:g} as given"
        display.say(f"Read {self.source}: {proof.source}, {proof.modules} modules{alpha}.")
        if proof.start:
            display.say(
                f"It began with {proof.start}: what is written is for that base as it is, of twice the rank."
            )
        if FORMATS[proof.source].warning:
            display.say(FORMATS[proof.source].warning)
        for note in proof.notes:
            display.say(note)
        display.say(f"Wrote {self.path}: {proof.target}, {FORMATS[proof.target].purpose}.")
        if proof.has_magnitudes:
            display.say(
                "It has DoRA's magnitude: PEFT reads it, most engines do not; moslora doctor --for lists them."
            )
        if proof.rank_error is not None:
            worst = max(proof.rank_errors, key=lambda name: proof.rank_errors[name])
            display.say(
                f"Rank {proof.rank}: relative error of ΔW {proof.rank_error:.1e} over all modules, at most "
                f"{proof.rank_errors[worst]:.1e}, in {worst}. --json and moslora_proof.json have every module's."
            )
        display.say(
            f"Proven: largest relative error of ΔW {proof.max_relative_error:.1e} "
            f"(at most {proof.tolerance:.2g} allowed), in {proof.worst_module}; read back by {proof.reader}"
            f"{self._held}."
        )

    @property
    def _held(self) -> str:
        """Say against which base names and shapes were held, where that is a transformers model."""
        proof = self.proof
        if proof.held_against is not None:
            return f", its names those of {proof.held_against}"
        return f"; {NOT_HELD}" if proof.target in ("lora", "native") else ""

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {"out": str(self.path), **dataclasses.asdict(self.proof)}


@dataclass(frozen=True, repr=False)
class CombinedAdapter(Printable):
    """The weighted sum of adapters, written as one.

    Attributes:
        sources: What was read.
        path: What was written.
        format: Its format.
        proof: What was measured on the written files.
        asked_rank: The rank that the caller asked for; None if the sum is exact.
    """

    sources: tuple[Path, ...]
    path: Path
    format: str
    proof: CombineProof
    asked_rank: int | None = None

    def show(self, display: Display) -> None:
        """Write what was read, what was written, and the proof."""
        proof = self.proof
        for source, weight, start in zip(self.sources, proof.weights, proof.starts, strict=True):
            began = f" It began with {start}." if start else ""
            display.say(f"Read {source}, weight {weight:g}.{began}")
        for note in proof.notes:
            display.say(note)
        display.say(f"Wrote {self.path}: {self.format}, {proof.modules} modules, rank up to {proof.rank}.")
        if proof.rank_error is not None:
            display.say(
                f"Rank {self.asked_rank}: relative error of ΔW {proof.rank_error:.1e} over all modules, against the "
                "exact sum."
            )
        display.say(
            f"Proven: largest relative error of ΔW against the sum {proof.max_relative_error:.1e} "
            f"(at most {proof.tolerance:.2g} allowed), in {proof.worst_module}; read back by {proof.reader}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {"out": str(self.path), **dataclasses.asdict(self.proof)}


@dataclass(frozen=True, repr=False)
class MergedModel(Printable):
    """A base model with an adapter merged into its weights.

    Attributes:
        base: The base model, as the caller named it.
        adapter: What was merged.
        path: What was written.
        proof: What was measured on the written files.
    """

    base: str
    adapter: Path
    path: Path
    proof: MergeProof

    def show(self, display: Display) -> None:
        """Write what was read, what was written, and the proof."""
        proof = self.proof
        display.say(f"Read {self.base} and {self.adapter}: {proof.modules} modules.")
        for note in proof.notes:
            display.say(note)
        if proof.start:
            display.say(f"It began with {proof.start}.")
        display.say(
            f"Wrote {self.path}: {proof.bytes:,} bytes of weights. Every weight with a ΔW changed, the rest is a copy."
        )
        if proof.tokenizer:
            differs = "; ".join(proof.tokenizer_differs)
            display.say(
                f"The tokenizer and chat template are those beside the adapter ({some(proof.tokenizer)}), "
                + (f"not the base's: {differs}." if differs else "which say the same as the base's.")
            )
        if proof.replaced:
            display.say(
                f"Put in place of the base's: {len(proof.replaced)} tensors ({some(proof.replaced)})."
            )
        display.say(
            f"Proven: {proof.checked:,} entries of all {proof.modules} modules read back, largest relative error "
            f"{proof.max_relative_error:.1e}; each entry within its rounding (at worst {proof.error_ratio:.2f} of it, "
            f"in {proof.worst_module})."
        )
        if proof.lost:
            display.say(
                f"Rounding to the base's dtype left nothing of ΔW in {len(proof.lost)} modules: "
                f"{some(proof.lost)}. To keep it, "
                "merge into the base in float32, or ship the adapter."
            )
        elif proof.least_kept < LEAST_SURVIVING:
            display.say(
                f"Rounding to the base's dtype kept {proof.least_kept:.0%} of ΔW in {proof.least_kept_module}: it is "
                "small beside the weights. To keep it all, merge into the base in float32, or ship the adapter."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {"out": str(self.path), **dataclasses.asdict(self.proof)}


@dataclass(frozen=True, repr=False)
class PushedAdapter(Printable):
    """An adapter on the Hub, or what would be uploaded of it.

    Attributes:
        adapter: What was named.
        repo: The repository.
        revision: The branch; None for ``main``.
        pushed: What was uploaded, left out and verified.
    """

    adapter: Path
    repo: str
    revision: str | None
    pushed: Pushed

    def show(self, display: Display) -> None:
        """Write the files, what stays here, and the proof."""
        pushed = self.pushed
        where = self.repo + (f" ({self.revision})" if self.revision else "")
        verb = "Would upload" if pushed.commit is None else "Uploaded"
        display.say(f"{verb} {len(pushed.files)} files of {self.adapter} to {where}:")
        for file in pushed.files:
            remark = f"  ({file.remark})" if file.remark else ""
            display.say(f"  {file.name}  {size_in_words(file.size)}{remark}")
        if pushed.left_out:
            display.say(
                f"Stays here: {some(pushed.left_out)}. Checkpoints, data and predictions are never uploaded."
            )
        for note in pushed.notes:
            display.say(note)
        if pushed.commit is None:
            display.say("Nothing was uploaded, and the Hub was not asked anything.")
            return
        display.say(f"Commit {pushed.commit}: {pushed.url}")
        display.say(
            f"Proven: the Hub has {pushed.verified} of {len(pushed.files)} files with the hashes of what was sent."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {"repo": self.repo, "revision": self.revision or "main", **dataclasses.asdict(self.pushed)}
