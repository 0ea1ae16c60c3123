"""Doctor: whether an adapter is sound, fits its base, and will run where it is meant to run.

What an engine would do is not guessed where it can be tried: the adapter is written in the engine's format into a
temporary place and read back. What cannot be tried here stands as a rule, with its source.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moslora.adapters.arithmetic import tied_heads
from moslora.adapters.beside import UNTIE
from moslora.adapters.engines.predict import FIXES, Prediction, predict
from moslora.adapters.export import export_adapter
from moslora.adapters.factors import Adapter, Begun
from moslora.adapters.facts import facts_of, is_untrained
from moslora.adapters.findings import NOT_HELD, Diagnosis, Finding, some
from moslora.adapters.fit import Fit, fit_to_base, fit_to_named_base
from moslora.adapters.formats import comfyui
from moslora.adapters.formats.reading import detect, read_adapter
from moslora.adapters.formats.skeleton import misfits_by_peft
from moslora.adapters.formats.table import FORMATS
from moslora.adapters.own_tokenizer import tokenizer_findings
from moslora.adapters.targets import check_target, format_for
from moslora.errors import AdapterError, ModelError, ProofError
from moslora.files import scratch
from moslora.models.fingerprint import fingerprint
from moslora.models.loading import load_tokenizer
from moslora.models.names import resolve_model
from moslora.models.shards import open_weights
from moslora.models.tokenizer_files import read_tokenizer

__all__ = ["diagnose"]

RENAME = "moslora export ADAPTER OUT --base MODEL, which writes the names that PEFT finds."
# Of ΔW to what a start took out of the base: factors that were trained from that start stay nearer to it.
FAR_FROM_START = 1.0


def diagnose(
    adapter: str | Path,
    base: str | None = None,
    engines: Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
) -> Diagnosis:
    """Look an adapter over.

    Args:
        adapter: Adapter of any format that is read.
        base: Base model to hold it against; None to look at the adapter alone.
        engines: Keys of ``targets.TARGETS``, where it will run.
        say: Receives a line before long work.

    Returns:
        Every finding; an adapter that cannot be read is one.

    Raises:
        AdapterError: If nothing exists at ``adapter``.
        ModelError: If the base cannot be read.
        UsageError: If an engine is unknown.
    """
    path = Path(adapter)
    for name in engines:
        check_target(name)
    if not path.exists():
        detect(path)  # raises, with the nearest name
    try:
        format_ = detect(path)
        found = read_adapter(path, base=base, say=say)
    except (AdapterError, ProofError) as error:
        findings = (Finding("error", "read", str(error)),)
        return Diagnosis(str(adapter), None, base, tuple(engines), findings)
    findings_list = [
        *_read(found, format_),
        *_start(found),
        *(fact.finding for fact in facts_of(found)),
    ]
    weights = None if base is None else open_weights(base, say)
    fit: Fit | None = None
    try:
        fit = fit_to_named_base(found, None) if weights is None else fit_to_base(found, weights, str(base))
    except AdapterError as error:
        findings_list.append(Finding("error", "fits", str(error)))
    else:
        findings_list += [*_fits(fit), *_tied(fit)] if fit is not None else _not_held(found)
    if base is not None and weights is not None:
        findings_list += [*_named(found, base), *tokenizer_findings(path, weights), *_as_trained(path, base)]
    config = None if weights is None else weights.config
    predictions: dict[str, Prediction] = {}
    for name in engines:
        findings_list += _tried(name, path, found, format_, base, fit)
        predictions[name] = predict(name, _as_loaded(name, found, format_, fit), config)
        findings_list += _predicted(name, predictions[name], len(found.modules))
    return Diagnosis(
        str(adapter),
        format_,
        base,
        tuple(engines),
        tuple(findings_list),
        held=fit is not None,
        applied={name: tuple(one.applied) for name, one in predictions.items()},
        not_applied={name: dict(one.lost) for name, one in predictions.items()},
        commands={name: one.command for name, one in predictions.items() if one.command},
    )


# --- The adapter alone --------------------------------------------------------------------------------------


def _read(adapter: Adapter, format_: str) -> Iterator[Finding]:
    """The reader has refused empty, NaN and infinite tensors, and factors that miss or do not fit."""
    ranks = sorted({factors.r for factors in adapter.modules.values()})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    yield Finding(
        "ok",
        "read",
        f"{format_}, {len(adapter.modules)} modules, {rank}, {adapter.parameters:,} parameters; every tensor has its "
        "place, none is empty, NaN or infinite.",
    )
    if format_ == "official":
        yield Finding(
            "warning",
            "label",
            "It calls itself a LoRA and carries mixers: stock PEFT would run it without them, and be wrong.",
            "moslora import ADAPTER OUT, then moslora export OUT LORA.",
        )


def _start(adapter: Adapter) -> Iterator[Finding]:
    if adapter.begun is not None:
        yield from _begun(adapter.begun)
    elif any(
        "init_lora_weights" in part
        for part in adapter.config.get("components", {"": adapter.config}).values()
    ):
        yield Finding(
            "note",
            "start",
            "It started from its base's weights, and subtracts that start, so its ΔW has twice its rank: "
            "figures are of both together, and so is the export.",
        )


def _begun(begun: Begun) -> Iterator[Finding]:
    """PEFT takes such a start out of the base each time it loads the adapter; nothing else is known to."""
    yield Finding(
        "warning",
        "start",
        f"It began with {begun}, so that its ΔW has twice its rank (rounding leaves {begun.unsure:.0e} of it "
        "open). PEFT takes "
        "that start out of the base when it loads the adapter; other programs run s·B·A on the whole base, "
        "which is wrong.",
        f"moslora export ADAPTER OUT --base {begun.base}",
    )
    if begun.moved > FAR_FROM_START:
        yield Finding(
            "warning",
            "start",
            f"ΔW is {begun.moved:.2g} times as large as that start (median of the modules), as if the start "
            "were another "
            "base's.",
            "Name the base that it was trained on, as it was before the training.",
        )


# --- Beside its base ----------------------------------------------------------------------------------------


def _named(adapter: Adapter, base: str) -> Iterator[Finding]:
    parts = adapter.config.get("components", {"": adapter.config}).values()
    names = {str(name) for part in parts if (name := part.get("base_model_name_or_path"))}
    if names and base not in names and Path(base).name not in {Path(name).name for name in names}:
        yield Finding(
            "note", "base", f"It names {some(sorted(names))} as its base; held against {base}, as you asked."
        )


def _not_held(adapter: Adapter) -> Iterator[Finding]:
    yield Finding(
        "note",
        "base",
        f"{NOT_HELD[0].upper()}{NOT_HELD[1:]}: names and shapes of its modules are only what the file says.",
        "" if "components" in adapter.config else "moslora doctor ADAPTER --base MODEL",
    )
    for note in adapter.notes:
        yield Finding("warning", "names", note, RENAME)


def _fits(fit: Fit) -> Iterator[Finding]:
    for note in fit.notes:
        yield Finding("warning", "names", note, RENAME)
    for fault in fit.faults:
        yield Finding("error", "fits", fault)
    if fit.on_disk:
        yield Finding(
            "note",
            "experts",
            f"{len(fit.on_disk)} modules are experts by themselves, as {next(iter(sorted(fit.on_disk)))}, which the "
            "installed transformers holds in one tensor. PEFT converts such adapters while it loads them, for LoRA.",
        )
    if not fit.faults:
        beside = (
            f"; {fit.unchecked} could not be checked (experts, quantized or not stored)"
            if fit.unchecked
            else ""
        )
        yield Finding(
            "ok",
            "fits",
            f"Every module is in {fit.base} ({fit.names.origin}), with the same shape{beside}; none is missing.",
        )


def _tied(fit: Fit) -> Iterator[Finding]:
    tied = [module for module in fit.adapter.modules if fit.is_shared(module)]
    changed = [module for module in tied if not is_untrained(fit.adapter.modules[module])]
    if changed and not tied_heads(fit.adapter.modules, tied):
        yield Finding(
            "warning",
            "tied",
            f"{some(changed)} shares its weight between embedding and head: the adapter changes one use, a merge both.",
            UNTIE,
        )


def _as_trained(path: Path, base: str) -> Iterator[Finding]:
    """Compare with the run directory that the adapter is in."""
    record = path.resolve().parent / "run.json"
    try:
        hashes = json.loads(record.read_text(encoding="utf-8")).get("hashes") or {}
    except (OSError, ValueError, AttributeError):
        yield Finding(
            "note",
            "as trained",
            "There is no record of the training beside it, so chat template and weights were not compared.",
        )
        return
    source = resolve_model(base)
    try:
        template = load_tokenizer(source).chat_template
    except ModelError as error:
        yield Finding("warning", "template", f"The base's tokenizer cannot be read: {error}")
        return
    now = None if template is None else hashlib.sha256(str(template).encode()).hexdigest()
    beside = read_tokenizer(path)
    own = None if beside is None or beside.template is None else beside.template
    if own is not None and hashlib.sha256(own.encode()).hexdigest() == hashes.get("chat_template") != now:
        yield Finding(
            "warning",
            "template",
            "The chat template of the training is the one beside the adapter, not the base's.",
            "Load the tokenizer from the adapter's directory, or moslora merge BASE ADAPTER OUT, which carries it.",
        )
    elif now == hashes.get("chat_template"):
        yield Finding("ok", "template", "The base's chat template is the one of the training.")
    else:
        yield Finding(
            "error",
            "template",
            "The base's chat template is not the one of the training, so prompts would differ.",
            "Serve with the tokenizer of the base that it was trained on.",
        )
    # What a base is called may differ, as a folder and its path do; what it holds may not.
    own = json.loads(json.dumps(fingerprint(source)))
    found = hashes.get("base")
    recorded: dict[str, Any] = found if isinstance(found, dict) else {}
    kept = own["method"] if own["method"] == "commit" else "files"
    if own["method"] != recorded.get("method") or not own[kept]:
        yield Finding(
            "note",
            "base",
            "The run recorded its base in another form (a GGUF file or hub id against a folder), so their hashes were "
            "not compared. Name it as the recipe does to compare them.",
        )
    elif own[kept] == recorded.get(kept):
        yield Finding("ok", "base", "The base is, by its hashes, the one of the training.")
    else:
        yield Finding(
            "warning",
            "base",
            "The base is not, by its hashes, the one of the training (another revision, dtype or copy).",
            "Name the same base, or evaluate before you rely on it.",
        )


def _passed_over(name: str, path: Path, adapter: Adapter, fit: Fit | None) -> Finding | None:
    """Say what an engine that reads PEFT's files would leave out of this one, by its names."""
    misfits = None
    if fit is not None and fit.names.build is not None:
        misfits = misfits_by_peft(fit.names.build(), path, fit.new_heads)
    if misfits:
        what = f"PEFT passes over {len(misfits)} names of the file, or finds no tensor for them: {some(misfits)}."
        return Finding("error", f"{name}: names", what, RENAME)
    if adapter.notes and (misfits is None or name != "peft"):
        what = f"As it is, {name} finds no module of some names in the file and leaves it at zero there."
        return Finding("error", f"{name}: names", f"{what} {adapter.notes[0]}", RENAME)
    if fit is not None and fit.renamed and (misfits is None or name != "peft"):
        what = f"{name} may not know the names in the file, which are not the base's in memory."
        return Finding("warning", f"{name}: names", what, RENAME)
    return None


# --- Where it will run --------------------------------------------------------------------------------------


def _as_loaded(name: str, adapter: Adapter, format_: str, fit: Fit | None) -> Adapter:
    """Return what the engine would read: the file as it is, or, of another format, what an export writes of it."""
    try:
        is_own = format_for(name, adapter) == format_
    except AdapterError:
        is_own = True
    if is_own:
        return adapter
    # What is exported has its scale in B, and the configuration says so.
    config = {**adapter.config, "use_rslora": False, "alpha_pattern": {}}
    return replace(adapter if fit is None else fit.adapter, config=config)


def _predicted(name: str, found: Prediction, count: int) -> Iterator[Finding]:
    """Say what the engine's rules say, and the sum."""
    for one in found.findings:
        yield Finding(one.level, f"{name}: {one.check}", one.what, one.fix)
    if found.lost:
        outcomes = list(found.lost.values())
        kinds = ", ".join(f"{outcomes.count(word)} {word}" for word in dict.fromkeys(outcomes))
        rest = "none, for it does not load the adapter" if "refused" in outcomes else str(len(found.applied))
        yield Finding("error", f"{name}: applied", f"Of {count} modules {rest} are applied; {kinds}.")
    elif found.command:
        unsure = f", {len(found.unsure)} of them not for sure" if found.unsure else ""
        yield Finding(
            "note",
            f"{name}: applied",
            f"By the rules of {found.version}, all {count} modules are applied{unsure}, with: {found.command}",
        )


def _tried(
    name: str, path: Path, adapter: Adapter, format_: str, base: str | None, fit: Fit | None
) -> Iterator[Finding]:
    """Write the adapter as the engine loads it, read it back, and apply the engine's rules."""
    if name == "comfyui" and comfyui.has_own_names(adapter, format_):
        yield Finding(
            "note",
            f"{name}: format",
            f"It is {format_}, in names of the model's original code, which ComfyUI has too. That was not tried.",
            'See there whether it logs "lora key not loaded".',
        )
        return
    try:
        wanted = format_for(name, adapter)
    except AdapterError as error:
        yield Finding("error", f"{name}: format", str(error))
        return
    suffix = FORMATS[wanted].suffix
    with scratch("moslora-doctor") as folder:
        try:
            proof = export_adapter(path, folder / f"adapter{suffix}", wanted, base=base)
        except (AdapterError, ModelError, ProofError) as error:
            fix = "merge live" if adapter.has_magnitudes else "merge biases" if adapter.has_biases else ""
            fix = FIXES.get(fix, fix)
            yield Finding("error", f"{name}: format", f"It cannot be written as {wanted}. {error}", fix)
            return
    if adapter.begun is not None and name != "peft":
        yield Finding(
            "error",
            f"{name}: format",
            f"{name} would run its factors without taking the start ({adapter.begun.name}) out of the base. "
            "Written again as "
            f"{wanted} it is whole.",
            f"moslora export ADAPTER OUT{suffix} --to {wanted} --base {adapter.begun.base}",
        )
        return
    proven = f"ΔW is the same to {proof.max_relative_error:.1e}, read back by {proof.reader}."
    if format_ == wanted == "lora" and (unnamed := _passed_over(name, path, adapter, fit)):
        yield unnamed
        return
    if format_ == wanted:
        yield Finding("ok", f"{name}: format", f"{wanted}, as {name} loads it; written again and {proven}")
        return
    lost = comfyui.passed_over(adapter, format_) if name == "comfyui" and format_ == "diffusers" else {}
    yield Finding(
        "error" if lost else "warning",
        f"{name}: format",
        (
            f"It is {format_}, of which {name} would leave out {len(lost)} of {len(adapter.modules)} modules "
            f"({some(sorted(lost))}) and run the rest: {next(iter(lost.values()))}. As {wanted} it runs whole. "
            if lost
            else f"It is {format_}, and {name} loads {wanted}. "
        )
        + f"Tried: {proven}",
        f"moslora export ADAPTER OUT{suffix} --to {wanted}",
    )
