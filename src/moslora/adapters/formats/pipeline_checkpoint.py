"""What training on a diffusers pipeline leaves: a plain LoRA, and beside it the adapter that it was folded from.

    OUT/pytorch_lora_weights.safetensors    the fold, in diffusers' names: ``pipe.load_lora_weights(OUT)``
    OUT/moslora_checkpoint/unet/            the same adapter with its mixers, a PEFT directory for each model

The file says what the adapter does, the directories how it continues: optimizers hold states of A, M and B, which a
fold does not have. ``belongs_to.json`` has the digest of the file's tensors, so that the two are not taken for
each other's
when one of them was replaced. The directory's name has "checkpoint" in it because diffusers passes over such names when
it looks for a file to load.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from moslora.adapters.arithmetic import FOLD_TOLERANCE, distance
from moslora.adapters.formats import diffusers, native, through_diffusers
from moslora.adapters.formats.directory import WEIGHTS
from moslora.adapters.formats.layout import KEY_PREFIX
from moslora.adapters.formats.pipeline import join
from moslora.adapters.formats.tensors import load_tensors, read_whole_header, save_tensors
from moslora.errors import AdapterError
from moslora.files import is_running

__all__ = [
    "FOLDER",
    "Part",
    "find",
    "native_tensors",
    "place_of",
    "save",
]

FOLDER = "moslora_checkpoint"
BELONGS_TO = "belongs_to.json"
# What diffusers calls a file that it is given no name for.
DEFAULT_NAME = "pytorch_lora_weights.safetensors"


class Configuration(Protocol):
    """A configuration of PEFT, which writes itself."""

    inference_mode: bool

    def save_pretrained(self, save_directory: str) -> None:
        """Write ``adapter_config.json``."""


@dataclass(frozen=True)
class Part:
    """The adapter of one model of a pipeline.

    Attributes:
        config: Its configuration, a ``MoSLoRAConfig``.
        tensors: What ``get_peft_model_state_dict`` gives.
    """

    config: Configuration
    tensors: Mapping[str, Tensor]


def place_of(folder: Path, name: str | None = None) -> Path:
    """Return where the mixers are that belong to a file.

    Args:
        folder: The file's directory.
        name: The file's name; None for diffusers' own.
    """
    stem = Path(name or DEFAULT_NAME).stem
    return folder / (FOLDER if stem == Path(DEFAULT_NAME).stem else f"{stem}.{FOLDER}")


def save(
    folder: Path,
    parts: Mapping[str, Part],
    others: Mapping[str, Tensor],
    write_file: Callable[[Mapping[str, Tensor], dict[str, Any]], None],
    name: str | None = None,
) -> None:
    """Write the adapter of a pipeline, folded into a file and natively beside it.

    Whenever it is killed, the file that is there has the mixers that belong to it beside it, under whatever name.

    Args:
        folder: Directory of both; made if it is not there. What an earlier save left there is replaced.
        parts: The adapter, by model.
        others: Tensors of the file that are not of the adapter.
        write_file: Writes the file, given all its tensors and the metadata of the fold.
        name: The file's name; None for diffusers' own.

    Raises:
        AdapterError: If diffusers' files have no place for what was trained, or the fold is not what was trained. The
            adapter is then in ``place_of(folder, name)``, whole.
        OSError: If it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = place_of(folder, name)
    staged = _beside(place)
    staged.mkdir()
    try:
        for component, part in parts.items():
            _write_native(staged / component, part)
        try:
            tensors, metadata = _fold(staged, parts)
        except AdapterError as error:
            _put(staged, place)
            raise AdapterError(
                f"diffusers' LoRA file was not written: {error} What was trained is in {place}, a directory for each "
                "model, which PEFT and moslora export read."
            ) from error
        whole = {**others, **tensors}
        (staged / BELONGS_TO).write_text(json.dumps({"digest": _digest(whole)}) + "\n", encoding="utf-8")
        write_file(whole, metadata)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    _put(staged, place)  # what goes wrong from here on costs the name alone


def _beside(place: Path) -> Path:
    """Return a hidden name for a directory on its way to its place or away from it, in which ``find`` looks too."""
    return place.with_name(f".{os.getpid()}-{secrets.token_hex(4)}.{place.name}")


def _write_native(folder: Path, part: Part) -> None:
    folder.mkdir()
    config = copy.copy(part.config)
    config.inference_mode = True  # as PEFT writes it
    config.save_pretrained(str(folder))
    named = {f"{KEY_PREFIX}{key.removeprefix(KEY_PREFIX)}": tensor for key, tensor in part.tensors.items()}
    save_tensors(folder / WEIGHTS, named, {"format": "pt"})


def _fold(staged: Path, parts: Mapping[str, Part]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Fold what was written natively, and compare the file that comes of it in float64."""
    adapter = join({component: native.read(staged / component) for component in parts})
    file = staged / DEFAULT_NAME
    diffusers.write(adapter, file)
    found = distance(adapter, through_diffusers.with_paths_of(diffusers.read(file), adapter))
    if not found.max_relative_error <= FOLD_TOLERANCE:
        raise AdapterError(
            f"folded, ΔW of {found.worst_module} has a relative error of {found.max_relative_error:.1e}, above "
            f"{FOLD_TOLERANCE:.0e}."
        )
    tensors = load_tensors(file)
    about = read_whole_header(file).metadata
    file.unlink()
    metadata: dict[str, Any] = json.loads(about[diffusers.METADATA])
    return tensors, metadata


def _put(staged: Path, place: Path) -> None:
    """Put a directory in its place, and what was there away."""
    if place.exists():
        place.replace(_beside(place))
    staged.replace(place)
    for old in place.parent.glob(f".*.{place.name}"):  # also of saves that were killed
        found = re.fullmatch(rf"\.(\d+)-[0-9a-f]{{8}}\.{re.escape(place.name)}", old.name)
        if found and (int(found[1]) == os.getpid() or not is_running(int(found[1]))):
            shutil.rmtree(old, ignore_errors=True)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Hash names, dtypes, shapes and values."""
    found = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        found.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def find(folder: Path, tensors: Mapping[str, Tensor]) -> Path | None:
    """Find the mixers that belong to a file.

    Args:
        folder: The file's directory.
        tensors: All that the file holds.

    Returns:
        The directory around the models' own; None if there is none for these tensors.

    Raises:
        AdapterError: If what says whose they are is damaged.
    """
    places = [place for place in sorted(folder.glob(f"*{FOLDER}")) if (place / BELONGS_TO).is_file()]
    digest = _digest(tensors) if places else ""
    for place in places:
        try:
            said = json.loads((place / BELONGS_TO).read_text(encoding="utf-8"))["digest"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AdapterError(
                f"{place / BELONGS_TO} is damaged: {error}. Take another checkpoint."
            ) from error
        if said == digest:
            return place
    return None


def native_tensors(folder: Path) -> dict[str, Tensor]:
    """Read the adapter of one model as ``set_peft_model_state_dict`` takes it.

    Args:
        folder: A model's directory in what ``find`` gave.

    Returns:
        Tensors by name.

    Raises:
        AdapterError: If the file is missing or damaged.
    """
    return {key.removeprefix(KEY_PREFIX): t for key, t in load_tensors(folder / WEIGHTS).items()}
