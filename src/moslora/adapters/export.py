"""Export: write an adapter in another format and prove it by reading back what was written."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from moslora.adapters.arithmetic import FOLD_TOLERANCE, distance
from moslora.adapters.cards.card import Card, write_card
from moslora.adapters.cards.measured import carried, keep_measured, read_measured
from moslora.adapters.engines.forms import applied_form
from moslora.adapters.factors import Adapter
from moslora.adapters.facts import to_say
from moslora.adapters.fit import fit_to_named_base
from moslora.adapters.formats.reading import detect, read_adapter
from moslora.adapters.formats.table import FORMATS, WRITTEN
from moslora.adapters.lineage import keep_lineage, lineage_of
from moslora.adapters.naming import check_names, named_as
from moslora.adapters.ranks import to_rank
from moslora.adapters.targets import check_target, format_for
from moslora.errors import AdapterError, ProofError, UsageError
from moslora.files import new_directory, new_file
from moslora.models.names import HUB_ID
from moslora.wording import did_you_mean, first_line

__all__ = [
    "FOLD_TOLERANCE",
    "TOLERANCES",
    "ExportProof",
    "check_format",
    "export_adapter",
    "named_for_base",
    "proof_in_words",
    "written",
]

# As for FOLD_TOLERANCE, by what the dtype rounds an entry by: 5e-4 or 4e-3.
TOLERANCES = {"float32": FOLD_TOLERANCE, "float16": 2e-3, "bfloat16": 1.6e-2}

PROOF_FILE = "moslora_proof.json"
# Of a model with a head, as transformers writes it; other adapters have none.
MODEL_CONFIG = "config.json"
# Formats whose names are those of a transformers model; GGUF's writer has a table of its own for them.
BY_BASE = ("lora", "native", "gguf")


@dataclass(frozen=True)
class ExportProof:
    """What an export measured on the files it wrote.

    Attributes:
        source: Format that was read.
        target: Format that was written.
        modules: How many modules both have.
        max_relative_error: Largest relative error of ΔW over them, Frobenius, float64; of what was to be written,
            so a change of rank has no part in it.
        worst_module: Where it is.
        tolerance: What it was held against.
        reader: Whose reader read it back.
        dtype: Of what was written.
        rank: What every module was brought to; None if its own was kept.
        rank_error: ``‖ΔW - ΔW'‖ / ‖ΔW‖`` that the change of rank cost, over all modules together.
        rank_errors: The same by module.
        has_magnitudes: Whether it is a DoRA adapter, which fewer programs read than plain LoRA.
        held_against: The base that its names and shapes were held against; None if none was at hand.
        notes: What was put right in names, what does not fit that base, and what must be known of what was written
            (``facts.to_say``), as sentences.
        start: How a start was found that the source does not hold (PiSSA, OLoRA), and the base; empty if there is none.
    """

    source: str
    target: str
    modules: int
    max_relative_error: float
    worst_module: str
    tolerance: float
    reader: str = "moslora"
    dtype: str = "float32"
    rank: int | None = None
    rank_error: float | None = None
    rank_errors: Mapping[str, float] = field(default_factory=dict)
    has_magnitudes: bool = False
    held_against: str | None = None
    notes: tuple[str, ...] = ()
    start: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is a number within the tolerance."""
        return self.max_relative_error <= self.tolerance


@dataclass(frozen=True)
class Written:
    """What has been written and not yet been put in its place.

    Attributes:
        adapter: What was read back.
        reader: Whose reader that was.
        place: Where it is now, a directory or a file.
        tolerance: What a relative error of ΔW may be, in its dtype.
        dtype: Of its factors.
    """

    adapter: Adapter
    reader: str
    place: Path
    tolerance: float
    dtype: str

    def keep(self, proof: Any) -> None:
        """Write a proof beside the adapter, where the format is a directory."""
        if self.place.is_dir():
            text = json.dumps(asdict(proof), indent=2) + "\n"
            (self.place / PROOF_FILE).write_text(text, encoding="utf-8")

    def describe(self, card: Card) -> None:
        """Write a README.md, and what was measured, beside the adapter, where the format is a directory.

        Args:
            card: What to say.
        """
        if self.place.is_dir():
            if card.measured is not None:
                keep_measured(self.place, card.measured)
            write_card(self.place, card)


def check_format(to: str) -> None:
    """Refuse a format that is not written.

    Args:
        to: Its name.

    Raises:
        UsageError: If it is unknown or only read; the nearest name is in the message.
    """
    if to in WRITTEN:
        return
    if to in FORMATS:
        raise UsageError(f"The format {to} is only read; choose one of {', '.join(WRITTEN)}.")
    raise UsageError(
        f"The format {to} is unknown; choose one of {', '.join(WRITTEN)}.{did_you_mean(to, WRITTEN)}"
    )


@contextlib.contextmanager
def written(
    adapter: Adapter, out: Path, to: str, dtype: str | None = None, base: str | None = None
) -> Iterator[Written]:
    """Write an adapter beside its place, read it back, and put it there if nothing in the block raises.

    Args:
        adapter: What to write.
        out: Directory, or file where the format is a single one; must not exist yet.
        to: One of ``WRITTEN``.
        dtype: A key of ``TOLERANCES``; None for float32, or natively what the factors have.
        base: Base model, for formats that need its configuration; None for the one the adapter names.

    Yields:
        What was read back, through the other project's reader where it is installed.

    Raises:
        AdapterError: If the adapter has no place in the format, or its base is not known.
        ExistsError: If something exists at ``out`` already.
        UsageError: If the format or dtype is unknown, or the file's ending is another.
    """
    import torch

    check_format(to)
    format_ = FORMATS[to]
    if dtype is not None and dtype not in TOLERANCES:
        raise UsageError(f"dtype {dtype!r} is unknown; choose one of {', '.join(TOLERANCES)}.")
    if format_.suffix and out.suffix != format_.suffix:
        raise UsageError(f"{out} must end in {format_.suffix}: --to {to} writes a single file.")
    about: dict[str, Any] = {"base": base_config(adapter, base)} if format_.needs_base else {}
    how = {} if dtype is None else {"dtype": getattr(torch, dtype)}
    assert format_.write is not None, "check_format saw to it"
    with new_file(out) if format_.suffix else new_directory(out) as place:
        format_.write(adapter, place, **about, **how)
        if format_.read_back is not None:
            found, reader = format_.read_back(place, adapter, **about)
        else:
            assert format_.read is not None, "a format has a reader, or another project's"
            found, reader = format_.read(place), "moslora"
        name = dtype or "float32"
        yield Written(found, reader, place, TOLERANCES[name], name)


def base_config(adapter: Adapter, base: str | None) -> dict[str, Any]:
    """Find the configuration of the model that an adapter is for.

    Args:
        adapter: The adapter.
        base: A model as ``resolve_model`` takes it; None for the one that the adapter names.

    Returns:
        What its ``config.json`` says.

    Raises:
        AdapterError: If it is not known or cannot be read.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from moslora.models.loading import quiet_transformers
    from moslora.models.names import resolve_model

    name = base or adapter.config.get("base_model_name_or_path")
    if not name:
        raise AdapterError(
            "This format needs the configuration of the base, and the adapter does not name one. Give --base MODEL."
        )
    try:
        source = resolve_model(str(name), None if base else adapter.config.get("revision"))
        options: dict[str, Any] = {"revision": source.revision} if source.revision else {}
        if source.gguf_file is not None:
            options["gguf_file"] = source.gguf_file.name
        with quiet_transformers():
            found: dict[str, Any] = AutoConfig.from_pretrained(source.path, **options).to_dict()
    except Exception as error:  # whatever a damaged or unknown configuration raises
        raise AdapterError(
            f"The configuration of the base {name} cannot be read: {first_line(error)} Give --base MODEL, a "
            "folder with its config.json."
        ) from error
    if not found.get("architectures"):  # a GGUF base says its type alone
        kind = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(found.get("model_type"))
        found["architectures"] = [kind] if isinstance(kind, str) else []
    return found


def export_adapter(
    source: str | Path,
    out: str | Path,
    to: str | None = None,
    *,
    engine: str | None = None,
    rank: int | None = None,
    dtype: str | None = None,
    base: str | None = None,
    alpha: float | None = None,
    names: str | None = None,
) -> ExportProof:
    """Write an adapter in another format, and prove it.

    Args:
        source: Adapter of any format that is read.
        out: Directory to write, or file where the format is a single one; must not exist yet.
        to: One of ``WRITTEN``; ``"lora"`` if neither this nor ``engine`` is given. All but ``"native"`` fold the
            mixers.
        engine: A key of ``targets.TARGETS``, instead of ``to``: what it loads is written, in the form that it applies
            whole.
        rank: Bring every module to this rank, by the singular values of ΔW.
        dtype: A key of ``TOLERANCES``; None for float32, or natively what the factors have.
        base: Base model, for formats that need its configuration; None for the one the adapter names.
        alpha: The ``lora_alpha`` that it was trained with, for a file that does not say it.
        names: A key of ``naming.VERSIONS``, ``"transformers-4"`` or ``"transformers-5"``: whose names of modules and
            form of experts are written; None for those of the base as it is held in memory here.

    Returns:
        What was measured; where a directory is written it is kept there as ``moslora_proof.json``.

    Raises:
        AdapterError: If the source cannot be read or trusted, or has no place in the format.
        ExistsError: If something exists at ``out`` already.
        ProofError: If the proof failed; nothing is left at ``out``.
        UsageError: If an argument makes no sense.
    """
    if names is not None:
        check_names(names, engine)
    if engine is not None and to is not None:
        raise UsageError(f"--for {engine} chooses the format, so --to {to} has no place beside it. Give one.")
    if engine is not None:
        check_target(engine)
    else:
        to = to or "lora"
        check_format(to)
    source = Path(source)
    found = detect(source)
    adapter = read_adapter(source, alpha, base)
    to = to or format_for(str(engine), adapter)
    adapter, held_against, notes = named_for_base(adapter, to, base)
    if engine is not None or names is not None:
        adapter, said = _formed(adapter, base, engine, names)
        notes += said
    ranked = to_rank(adapter, rank) if rank is not None else None
    wanted = adapter if ranked is None else ranked.adapter
    with written(wanted, Path(out), to, dtype, base) as result:
        proof = replace(
            _prove(wanted, result, found, to),
            held_against=held_against,
            notes=(*notes, *to_say(adapter)),
            start=str(adapter.begun or ""),
        )
        if ranked is not None:
            proof = replace(proof, rank=rank, rank_error=ranked.overall, rank_errors=dict(ranked.errors))
        if not proof.passed:
            raise ProofError(
                f"The proof failed: ΔW of {proof.worst_module} has a relative error of "
                f"{proof.max_relative_error:.1e}, above {proof.tolerance:.0e}. Nothing was left at {out}."
            )
        result.keep(proof)
        measured = carried(read_measured(source), _changes(proof, dtype))
        result.describe(
            Card(Path(out).name, to, wanted, measured, [proof_in_words(proof)], hub_base=_hub_id(base))
        )
        story = lineage_of(source)
        if story is not None and result.place.is_dir():
            keep_lineage(result.place, story)
        carry_model_config(source, result.place, to)
    return proof


def _formed(
    adapter: Adapter, base: str | None, engine: str | None, names: str | None
) -> tuple[Adapter, tuple[str, ...]]:
    """Give an adapter the form that an engine applies whole, or the names of a version of transformers."""
    fit = fit_to_named_base(adapter, base)
    if names is not None:
        return named_as(names, adapter, fit)
    if fit is None:
        return applied_form(str(engine), adapter)

    def size(module: str) -> tuple[int, ...] | None:
        weight = fit.names.weight(module)
        return None if weight is None else weight.shape

    return applied_form(str(engine), adapter, fit.config, size)


def _hub_id(base: str | None) -> str | None:
    """Return the base that the caller named, if that is an id of the Hub."""
    return base if base and HUB_ID.fullmatch(base) and not Path(base).exists() else None


def _changes(proof: ExportProof, dtype: str | None) -> list[str]:
    """Say in what ΔW differs from the source's by more than rounding in float32."""
    changes = []
    if proof.rank_error is not None:
        changes.append(
            f"Every module was brought to rank {proof.rank}: relative error of ΔW {proof.rank_error:.1e} over all "
            "modules."
        )
    if dtype not in (None, "float32"):
        changes.append(f"Its factors were rounded to {dtype}.")
    return changes


def proof_in_words(proof: ExportProof) -> str:
    """Say in a sentence what an export proved.

    Args:
        proof: What it measured.
    """
    return (
        f"Largest relative error of ΔW {proof.max_relative_error:.1e} over {proof.modules} modules, at most "
        f"{proof.tolerance:.2g} allowed, in float64 on the written file, against the {proof.source} adapter it was "
        f"made from; read back by {proof.reader}."
    )


def carry_model_config(source: Path, place: Path, to: str) -> None:
    """Copy the configuration of a model with a head, which says how large the head is and what its outputs are called.

    Args:
        source: The adapter's directory.
        place: What was written.
        to: Its format.
    """
    beside = source / MODEL_CONFIG
    if to in ("lora", "native") and source.is_dir() and beside.is_file():
        (place / MODEL_CONFIG).write_bytes(beside.read_bytes())


def named_for_base(
    adapter: Adapter, to: str, base: str | None
) -> tuple[Adapter, str | None, tuple[str, ...]]:
    """Give an adapter the names that its base has in memory, where a base is at hand.

    Args:
        adapter: As it was read.
        to: One of ``WRITTEN``.
        base: A model as ``resolve_model`` takes it; None for the one that the adapter names.

    Returns:
        The adapter; the base; and what is to be known of the names, as sentences.

    Raises:
        AdapterError: If two modules of the adapter are one in the base.
        ModelError: If the base lacks a module of the adapter; or, of a base that the caller names, if anything does
            not fit.
    """
    fit = fit_to_named_base(adapter, base) if to in BY_BASE else None
    if fit is None:
        return adapter, None, adapter.notes
    if fit.unexpected or base is not None:
        fit.refuse()
    # A name in a configuration is less than a base that is asked for: its vocabulary may be enlarged before loading.
    own = adapter if to == "gguf" else fit.adapter
    return own, fit.base, (*(adapter.notes if to == "gguf" else fit.notes), *fit.faults)


def _equal(one: Any, two: Any) -> bool:
    """Compare two tensors, None standing for one that is missing."""
    import torch

    return one is not None and two is not None and one.dtype == two.dtype and torch.equal(one, two)


def _prove(adapter: Adapter, result: Written, source: str, target: str) -> ExportProof:
    read = FORMATS[target].read
    # Tensors beside the factors exist in directories alone, and our own reader sees all of them.
    extra = read(result.place).extra if read is not None and result.place.is_dir() else result.adapter.extra
    found = distance(adapter, result.adapter)
    names = adapter.extra.keys() | extra.keys()
    changed = sorted(n for n in names if not _equal(adapter.extra.get(n), extra.get(n)))
    if changed:
        raise ProofError(f"Tensors beside the factors were lost or changed: {changed[:5]}. Nothing was left.")
    return ExportProof(
        source,
        target,
        found.modules,
        found.max_relative_error,
        found.worst_module,
        result.tolerance,
        result.reader,
        result.dtype,
        has_magnitudes=adapter.has_magnitudes,
    )
