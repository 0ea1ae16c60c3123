"""The cards of a run: a README.md in every folder of its adapters, with what the run measured and proved."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.adapters.cards.base_name import BaseName, bare_name, base_name, is_path
from moslora.adapters.cards.card import README, Card, is_replaceable, write_card
from moslora.adapters.cards.measured import keep_measured, numbers
from moslora.adapters.formats.directory import CONFIG, WEIGHTS
from moslora.adapters.formats.pipeline import folders
from moslora.adapters.formats.reading import detect, read_adapter
from moslora.data.finding import DATASET_ID
from moslora.recipe.yaml_core import parse_yaml
from moslora.training.run_directory import RunDirectory

if TYPE_CHECKING:
    from moslora.display import Display

__all__ = ["drop_pefts_cards", "measured_by", "write_cards"]

# What a file's ending makes it for the loaders of datasets.
LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
SHOWN_SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
)
PACKAGES = ("moslora", "peft", "transformers", "trl", "diffusers", "torch")


def drop_pefts_cards(folder: Path) -> None:
    """Remove the templates of cards that PEFT's ``save_pretrained`` wrote: they name the base by a path.

    Args:
        folder: Of an adapter that was just saved.
    """
    for place in (folder, *folders(folder).values()):
        if is_replaceable(place / README):
            (place / README).unlink(missing_ok=True)


def write_cards(directory: RunDirectory, display: Display) -> None:
    """Write the cards of a run; a failure is told, and does not decide the run.

    Args:
        directory: The run, measured and proven.
        display: Where to tell.
    """
    try:
        measured = measured_by(directory)
        for place, file in _adapters(directory):
            keep_measured(place, measured, file)
            path = place if file == WEIGHTS else place / file
            format_ = detect(path)
            proofs = _folded(directory) if format_ != "native" else []
            title = directory.path.absolute().name
            written = Card(
                title, format_, read_adapter(path), measured, proofs, "" if path == place else file
            )
            if not write_card(place, written):
                display.warn(f"{place / README} was not written by moslora, so it was left as it is.")
    except Exception as error:  # a card shows an adapter, and must not decide a run
        display.warn(
            f"The card (README.md) of the adapter could not be written: {type(error).__name__}: {error}"
        )


def _adapters(directory: RunDirectory) -> Iterator[tuple[Path, str]]:
    """Yield the folders of a run's adapters, each with the name of its weights."""
    for place in (directory.adapter, directory.lora):
        if (place / CONFIG).is_file() or folders(place):
            yield place, WEIGHTS
        else:
            for file in sorted(place.glob("*.safetensors")):
                yield place, file.name


def _folded(directory: RunDirectory) -> list[str]:
    fold = numbers(directory.read().get("proofs", {}).get("fold"))
    if "max_relative_error" not in fold:
        return []
    return [
        f"Fold: largest relative error of ΔW {fold['max_relative_error']:.1e} over {fold.get('modules', 0):.0f} "
        "modules, in float64 on the written file, against the trained adapter with its mixers."
    ]


def measured_by(directory: RunDirectory) -> dict[str, Any]:
    """Return what a run knows of its adapter, without a path of this machine.

    Args:
        directory: The run.

    Returns:
        Of JSON's types: what ``keep_measured`` writes.
    """
    from moslora.training.reload_proof.proof import READERS

    record = directory.read()
    text = directory.recipe.read_text(encoding="utf-8")
    recipe: dict[str, Any] = parse_yaml(text, str(directory.recipe)) or {}
    base = record.get("base") or {}
    metrics = record.get("metrics") or {}
    proof = (record.get("proofs") or {}).get("reload")
    reader = READERS.get(proof["reader"]) if isinstance(proof, Mapping) and proof.get("reader") else None
    found: dict[str, Any] = {
        "base": dataclasses.asdict(_base(recipe, record)),
        "auto_class": base.get("auto_class"),
        "task": (recipe.get("task") or {}).get("kind"),
        "chat_template": (record.get("hashes") or {}).get("chat_template"),
        "data": _data(recipe.get("data") or {}, (record.get("hashes") or {}).get("data") or {}),
        "metrics": {
            key: metrics[key]
            for key in ("before", "after", "intervals", "examples", "answers", "unit")
            if key in metrics
        },
        "training": _settings(recipe, record),
    }
    if isinstance(proof, Mapping):
        found["reload"] = {
            "reader": reader.name if reader else str(proof.get("reader")),
            "what": reader.what if reader else "logit",
            "passed": proof.get("passed", True),
            **{k: v for k, v in numbers(proof).items() if k in ("max_logit_difference", "adapter_effect")},
        }
    return found


def _base(recipe: Mapping[str, Any], record: Mapping[str, Any]) -> BaseName:
    name = str((recipe.get("model") or {}).get("name") or "")
    kind = ((record.get("hashes") or {}).get("base") or {}).get("kind")
    if kind in ("folder", "gguf") and not is_path(name):
        return base_name(str(Path(name).absolute()))  # a folder of this machine that looks like a hub id
    return base_name(name)


def _data(section: Mapping[str, Any], hashes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the parts of the data that were hashed, by the last part of their names: one for each file."""
    parts = []
    for key, digest in hashes.items():
        if not isinstance(digest, str):
            continue
        role, _, own = key.partition(", ")  # as the tasks name one file of several
        source = section.get(role)
        if role == "heldout" and source is None:
            source = section.get("train")
        parts.append({"role": role, **_source(source, own), "sha256": digest})
    roles = {part["role"] for part in parts}
    if "heldout" not in roles and "train" in roles and section.get("heldout_fraction") is not None:
        trained = [part for part in parts if part["role"] == "train"]
        named = ", ".join(part["name"] for part in trained)
        parts.append({**trained[0], "role": "heldout", "name": f"a part of {named}", "sha256": None})
        if len(trained) > 1:
            parts[-1]["hub"] = None
    return parts


def _source(source: Any, own: str) -> dict[str, Any]:
    """Return name, hub id and loader of a file or hub data set; ``own`` is the one meant of several."""
    entries = source if isinstance(source, list) else [source]
    names = [one.get("path") if isinstance(one, Mapping) else one for one in entries]
    given = [one for one in names if isinstance(one, str)]
    # One of several is called by its last part, or in full where two have the same.
    fitting = [one for one in given if not own or own in (one, Path(one).name)]
    text = fitting[0] if fitting else own
    path = Path(text)
    is_hub = bool(DATASET_ID.fullmatch(text)) and not path.exists() and path.suffix not in LOADERS
    loader = LOADERS.get(path.suffix.lower()) or ("imagefolder" if text and path.is_dir() else None)
    return {
        "name": text if is_hub else bare_name(str(path.absolute())) if text else "",
        "hub": text if is_hub else None,
        "loader": None if is_hub else loader,
    }


def _settings(recipe: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings that a reader wants first, as texts."""
    trainer, adapter = recipe.get("trainer") or {}, recipe.get("adapter") or {}
    settings = {
        f"adapter.{key}": value for key, value in adapter.items() if value not in (None, {}, [], False)
    }
    settings |= {
        f"trainer.{key}": trainer[key] for key in SHOWN_SETTINGS if trainer.get(key) not in (None, -1)
    }
    settings["seed"] = recipe.get("seed")
    versions = record.get("versions") or {}
    settings |= {name: versions[name] for name in PACKAGES if versions.get(name)}
    return {key: _as_text(value) for key, value in settings.items() if value is not None}


def _as_text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_as_text, value))
    return bare_name(str(value)) if isinstance(value, str) else str(value)
