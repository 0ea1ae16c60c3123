"""Merge: an adapter into the full weights of its base, on disk, without loading the model.

Shards are copied by bytes, but for the adapted tensors, summed a block of rows at a time on the way
(``merge_blocks.py``): sizes and offsets do not change, so memory does not grow with the model. ``W + s·B·(M·A)`` is
summed in float32 and rounded once.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from moslora.adapters.arithmetic import tied_heads
from moslora.adapters.beside import UNTIE, Replacement, replacements
from moslora.adapters.export import PROOF_FILE
from moslora.adapters.factors import Factors
from moslora.adapters.facts import is_untrained, refuse, to_say
from moslora.adapters.fit import Fit, fit_to_base
from moslora.adapters.formats.reading import read_adapter
from moslora.adapters.merge_blocks import Change, check_change, in_threads, write_shard
from moslora.adapters.merge_experts import expert_changes, expert_paths
from moslora.adapters.orientation import is_transposed
from moslora.adapters.own_tokenizer import check_rows, differences
from moslora.errors import AdapterError, ModelError, ProofError
from moslora.files import new_directory
from moslora.models.shards import DTYPES, INDEX, Stored, StoredWeights, open_weights
from moslora.models.tokenizer_files import TEMPLATES, carry_tokenizer, read_tokenizer

__all__ = ["MergeProof", "merge"]

# Weights in other forms, which would be the unmerged ones. (And moslora.json, a cached folder's own record.)
LEFT_BEHIND = (".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".pdparams", ".safetensors")
NOTHING_SURVIVING = 0.01  # of every module: the merge is the base
LEAST_SURVIVING = 0.9  # share of ΔW below which rounding has lost enough of it to warn


@dataclass(frozen=True)
class MergeProof:
    """What a merge measured on the files it wrote.

    Attributes:
        modules: How many weights and biases were changed, or replaced by tensors that were trained whole. All else
            is a copy of the base's bytes.
        checked: How many entries of their weights were read again and compared, some of every module.
        error_ratio: Largest error of a written entry against float64, relative to what the one rounding to the
            weight's dtype and the product's own rounding allow that entry; at most 1.
        worst_module: Where it is.
        max_relative_error: Largest error of an entry, relative to the largest entry of its weight.
        least_kept: Smallest share of ΔW that survived the rounding, over the modules, by the entries that were read
            again: ``⟨W' - W, ΔW⟩ / ‖ΔW‖²``, 1 if all of it. In 16 bits a small ΔW is lost in part, in any merge.
        least_kept_module: Where it is.
        bytes: Size of the weights.
        start: How a start was found that the adapter does not hold (PiSSA, OLoRA); empty if there is none.
        lost: Modules of which rounding left no entry changed.
        replaced: Tensors of the base that the adapter has whole (``modules_to_save``, biases).
        notes: What was put right in the adapter's names, and what must be known of it (``facts.to_say``), as sentences.
        tokenizer: Files of the tokenizer and chat template that lay beside the adapter and were carried over, in the
            place of the base's; empty if it has none.
        tokenizer_differs: In what they differ from the base's.
    """

    modules: int
    checked: int
    error_ratio: float
    worst_module: str
    max_relative_error: float
    least_kept: float
    least_kept_module: str
    bytes: int
    start: str = ""
    lost: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    tokenizer: tuple[str, ...] = ()
    tokenizer_differs: tuple[str, ...] = ()


def merge(
    base: str | Path, adapter: str | Path, out: str | Path, say: Callable[[str], None] = lambda _: None
) -> MergeProof:
    """Write the base's weights with an adapter merged into them, and prove it.

    Args:
        base: Folder, hub id, GGUF file (dequantized to float32 on the way) or packaged model.
        adapter: Adapter directory of any format that is read.
        out: Directory to write; must not exist yet, or be empty.
        say: Receives a line before long work.

    Returns:
        What was measured; it is kept in ``out`` as ``moslora_proof.json``.

    Raises:
        AdapterError, ModelError: If adapter and base cannot be read, or do not fit; the message says what to do.
        ExistsError: If something exists at ``out`` already.
        ProofError: If a weight was not changed, or not to what it should be. Nothing is left at ``out``.
        OSError: If the disk is too small.
    """
    found, out = read_adapter(adapter, base=str(base), say=say), Path(out)
    weights = open_weights(base, say)
    folder, shards = weights.folder, weights.shards
    if weights.quantization:
        raise ModelError(
            f"{base} has quantized weights ({weights.quantization}), into "
            "which ΔW cannot be rounded. Merge into the base in 16 or 32 bits and quantize the result."
        )
    fit = fit_to_base(found, weights, str(base))
    changes, wholes = _plan(fit, weights)
    own = read_tokenizer(Path(adapter))
    if own is not None:
        check_rows(own, weights)
    size = sum((folder / shard).stat().st_size for shard in shards)
    with new_directory(out) as place:
        free = shutil.disk_usage(place).free
        if free < size + (1 << 20):
            raise OSError(f"{out} needs {size:,} bytes, {free:,} are free. Name a place on a larger disk.")
        lost: list[str] = []
        say(f"Merging {len(changes)} modules into {len(shards)} shards, {size:,} bytes.")
        for path in sorted(folder.iterdir()):
            if path.is_file() and not path.name.endswith((*LEFT_BEHIND, ".index.json")):
                shutil.copyfile(path, place / path.name)
        if (folder / INDEX).is_file():
            shutil.copyfile(folder / INDEX, place / INDEX)
        if (folder / TEMPLATES).is_dir():
            shutil.copytree(folder / TEMPLATES, place / TEMPLATES)
        if own is not None:
            carry_tokenizer(own, place)
        for shard in shards:
            everything: list[Change | Replacement] = [*changes, *wholes]
            of_shard = [change for change in everything if change.stored.shard == shard]
            lost += write_shard(
                folder / shard, place / shard, sorted(of_shard, key=lambda one: one.stored.start)
            )
        _check_wholes(place, wholes)
        proof = replace(
            _prove(folder, place, changes, size),
            modules=len(changes) + len(wholes),
            start=str(found.begun or ""),
            lost=tuple(lost),
            replaced=tuple(whole.name for whole in wholes),
            notes=(*fit.notes, *to_say(fit.adapter)),
            tokenizer=own.names if own is not None else (),
            tokenizer_differs=differences(own, weights.folder) if own is not None else (),
        )
        if not proof.error_ratio <= 1:
            raise ProofError(
                f"The proof failed: an entry of {proof.worst_module} is off by {proof.error_ratio:.3g} times what "
                f"rounding explains. Nothing was left at {out}."
            )
        (place / PROOF_FILE).write_text(json.dumps(asdict(proof), indent=2) + "\n", encoding="utf-8")
    return proof


def _plan(fit: Fit, weights: StoredWeights) -> tuple[list[Change], list[Replacement]]:
    """Find the tensor of every module, and refuse what does not fit before anything is written."""
    adapter = fit.adapter
    adapter.refuse_magnitudes("moslora merge adds ΔW, and does not rescale rows")
    fit.refuse()
    refuse(adapter, "merge")
    wholes = replacements(fit, weights)
    changes: list[Change] = []
    among = expert_paths(adapter, weights.config.get("model_type"))
    if among:
        own = {path: factors for path, factors in adapter.modules.items() if path in among}
        changes += expert_changes(replace(adapter, modules=own), weights)
    sharing = {module for module in adapter.modules if fit.is_shared(module)}
    heads = tied_heads(adapter.modules, sharing)  # merged with the embedding, whose weight they share
    for module, factors in sorted((n, f) for n, f in adapter.modules.items() if n not in heads | among):
        if is_untrained(factors):
            continue  # the weight is the base's, and a copy of it is right
        if module in sharing and not heads:
            raise ModelError(
                f"{module} shares its weight between embedding and head, so merging would change both. {UNTIE}"
            )
        change = lay_out(module, factors, weights.table[fit.stored_name(module)], fit)
        if not factors.is_zero():  # else its bias alone was trained
            changes.append(change)
        changes += _change_of_bias(module, factors, fit, weights)
    places = [(change.stored.shard, change.stored.start) for change in changes]
    if both := [whole.name for whole in wholes if (whole.stored.shard, whole.stored.start) in places]:
        raise AdapterError(
            f"The adapter has {both[0]} whole, and a ΔW for it as well, so that a merge would have to choose. Load it "
            "with PeftModel.from_pretrained, call merge_and_unload() and save the model."
        )
    doubled = len(places) - len(set(places))
    if doubled:
        raise ModelError(
            f"{doubled} modules of the adapter share their weight with others; untie the base first."
        )
    return changes, wholes


def _change_of_bias(module: str, factors: Factors, fit: Fit, weights: StoredWeights) -> list[Change]:
    """Return what a bias on B changes; nothing where there is none, or it is zero."""
    if factors.bias is None or not factors.bias.any():
        return []
    name = f"{fit.stored_name(module).removesuffix('weight')}bias"
    if name not in weights.table:
        raise AdapterError(
            f"The adapter has a bias on B of {module} (lora_bias=True), and the base has no {name} to add it to. Keep "
            "the adapter beside the base, or export it --to lora."
        )
    stored = weights.table[name]
    if stored.dtype not in DTYPES or stored.shape != tuple(factors.bias.shape):
        raise ModelError(
            f"{name} is {stored.dtype} of shape {stored.shape}, and the adapter's bias on B of shape "
            f"{tuple(factors.bias.shape)}. Name the base that the adapter was trained on."
        )
    one = factors.bias.new_ones(1, 1)
    return [Change(f"{module}.bias", stored, factors.bias[:, None], one, one, factors.scale)]


def lay_out(
    module: str,
    factors: Factors,
    stored: Stored,
    fit: Fit,
) -> Change:
    """Lay ΔW out as the base stores its weight.

    Args:
        module: Path in the base model.
        factors: Its factors.
        stored: Where its weight is stored.
        fit: The adapter, held against the base.

    Returns:
        The change; nothing is read or written.

    Raises:
        ModelError: If it does not fit.
    """
    if stored.dtype not in DTYPES:
        raise ModelError(
            f"{module} is stored as {stored.dtype}; weights of {', '.join(DTYPES)} can be merged into. Take the base "
            "in 16 or 32 bits and quantize the result."
        )
    A, M, B = factors.A, factors.M, factors.B
    shape = (B.shape[0], A.shape[1])
    as_it_is = Change(module, stored, B, M, A, factors.scale)
    turned = Change(module, stored, A.T, M.T, B.T, factors.scale)
    kind, lies = factors.form.kind, stored.shape
    if kind == "conv":
        fits = len(lies) == 2 + len(factors.form.kernel) and lies[0] == shape[0] and factors.form.groups == 1
        if fits and lies[2:] == factors.form.kernel and shape[1] == math.prod(lies[1:]):
            return as_it_is
    elif kind == "embedding" and lies == shape[::-1]:
        return turned
    elif kind == "linear":
        if lies == shape[::-1] and is_transposed(fit, module, shape, lies):
            return turned
        if lies == shape:
            return as_it_is
    raise ModelError(
        f"{module}: the adapter changes a {kind} weight of (out, in) {shape}, the base's is {lies}. Name the base "
        "that the adapter was trained on."
        + (
            " Convolutions with groups cannot be merged into; export the adapter --to lora, which PEFT runs."
            if factors.form.groups > 1
            else ""
        )
    )


def _check_wholes(place: Path, wholes: Sequence[Replacement]) -> None:
    """Read back what was put in the place of the base's tensors."""
    for whole in wholes:
        with (place / whole.stored.shard).open("rb") as file:
            file.seek(whole.stored.start)
            if file.read(whole.end - whole.stored.start) != whole.bytes():
                raise ProofError(f"The proof failed: {whole.name} is not what the adapter has.")


def _prove(folder: Path, place: Path, changes: list[Change], size: int) -> MergeProof:
    """Read rows of every written weight again and compare them with float64."""
    worst, worst_module, relative = -1.0, "", 0.0
    checks = in_threads([partial(check_change, folder, place, change) for change in changes])
    for change, seen in zip(changes, checks, strict=True):
        relative = max(relative, seen.relative)
        # NaN is the worst, and stays so whatever comes after it.
        if not math.isnan(worst) and not seen.ratio <= worst:
            worst, worst_module = seen.ratio, change.module
    # Share of ΔW, by module. Of some modules it is said, as of those that lose a part.
    kept = {
        change.module: seen.kept
        for change, seen in zip(changes, checks, strict=True)
        if seen.kept is not None
    }
    if kept and worst <= 1 and max(kept.values()) < NOTHING_SURVIVING:
        raise ProofError(
            f"ΔW of {next(iter(kept))} is too small to change any entry in {changes[0].stored.dtype}, and so "
            "is that of all "
            "other modules; nothing was written. Merge into a base of higher precision, or keep the adapter beside it."
        )
    least_module = min(kept, key=lambda module: kept[module], default="")
    least = min(1.0, kept.get(least_module, 1.0))
    checked = sum(seen.checked for seen in checks)
    return MergeProof(len(changes), checked, worst, worst_module, relative, least, least_module, size)
