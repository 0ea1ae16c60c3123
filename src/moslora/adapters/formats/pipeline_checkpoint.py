"""What training on a diffusers pipeline leaves: a plain LoRA, and beside it the adapter that it was folded from.

    OUT/pytorch_lora_weights.safetensors    the fold, in diffusers' names: ``pipe.load_lora_weights(OUT)``
    OUT/moslora_checkpoint/unet/            the same adapter with its mixers, a PEFT directory for each model

The file says what the adapter does, the directories how it goes on: optimizers hold states of A, M and B, which a fold
does not have. ``belongs_to.json`` has the digest of the file's tensors, so that the two are not taken for each other's
when one of them was replaced. The directory's name has "checkpoint" in it because diffusers passes over such names when
it looks for a file to load.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moslora.adapters.arithmetic import FOLD_TOLERANCE, compare
from moslora.adapters.formats import diffusers, native, through_diffusers
from moslora.adapters.formats.directory import WEIGHTS
from moslora.adapters.formats.layout import KEY_PREFIX
from moslora.adapters.formats.pipeline import join
from moslora.adapters.formats.tensors import load_tensors, read_header, save_tensors
from moslora.errors import AdapterError
from moslora.tuner.config import MoSLoRAConfig

__all__ = [
    "FOLDER",
    "Part",
    "find",
    "native_tensors",
    "place_of",
    "resume_for_diffusers",
    "save",
    "save_for_diffusers",
]

FOLDER = "moslora_checkpoint"
BELONGS_TO = "belongs_to.json"
# What diffusers calls a file that it is given no name for.
DEFAULT_NAME = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Part:
    """The adapter of one model of a pipeline.

    Attributes:
        config: Its configuration.
        tensors: What ``get_peft_model_state_dict`` gives.
    """

    config: MoSLoRAConfig
    tensors: Mapping[str, Tensor]


def place_of(folder: Path, name: str | None = None) -> Path:
    """Return where the mixers lie that belong to a file.

    Args:
        folder: The file's directory.
        name: The file's name; None for diffusers' own.
    """
    stem = Path(name or DEFAULT_NAME).stem
    return folder / (FOLDER if stem == Path(DEFAULT_NAME).stem else f"{stem}.{FOLDER}")


def save(
    folder: Path,
    parts: Mapping[str, Part],
    write_file: Callable[[dict[str, Tensor], dict[str, Any]], Mapping[str, Tensor]],
    name: str | None = None,
) -> None:
    """Write the adapter of a pipeline, folded into a file and natively beside it.

    Args:
        folder: Directory of both; made if it is not there. What an earlier save left there is replaced.
        parts: The adapter, by model.
        write_file: Writes the file, given the tensors of the fold and their metadata; returns all tensors that are in
            the file.
        name: The file's name; None for diffusers' own.

    Raises:
        AdapterError: If diffusers' files have no place for what was trained, or the fold is not what was trained. The
            adapter is then in ``place_of(folder, name)``, whole.
        OSError: If it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = place_of(folder, name)
    staged = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=folder))
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
        whole = write_file(tensors, metadata)
        (staged / BELONGS_TO).write_text(json.dumps({"digest": _digest(whole)}) + "\n", encoding="utf-8")
        _put(staged, place)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


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
    found = compare(adapter, through_diffusers.with_paths_of(diffusers.read(file), adapter))
    if not found.max_relative_error <= FOLD_TOLERANCE:
        raise AdapterError(
            f"folded, ΔW of {found.worst_module} has a relative error of {found.max_relative_error:.1e}, above "
            f"{FOLD_TOLERANCE:.0e}."
        )
    tensors = load_tensors(file)
    _, about = read_header(file)
    file.unlink()
    metadata: dict[str, Any] = json.loads(about[diffusers.METADATA])
    return tensors, metadata


def _put(staged: Path, place: Path) -> None:
    """Put a directory in its place, and what was there away."""
    staged.chmod(place.parent.stat().st_mode & 0o777)
    if not place.exists():
        staged.replace(place)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    place.replace(old / place.name)
    staged.replace(place)
    shutil.rmtree(old)


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


def save_for_diffusers(folder: str | Path, *, name: str | None = None, **models: nn.Module) -> None:
    """Save adapters of a pipeline's models: a plain LoRA for ``load_lora_weights``, and the mixers beside it.

    diffusers' own scripts do this with their ``save_lora_weights``; this is for loops of one's own::

        moslora.save_for_diffusers("out", unet=unet, text_encoder=text_encoder)
        pipe.load_lora_weights("out")  # in any program

    Args:
        folder: Directory to write into. What an earlier save left there is replaced.
        name: The file's name; None for diffusers' own.
        **models: Models that carry an adapter of the name "default", by their names in the pipeline.

    Raises:
        AdapterError: If diffusers' files have no place for what was trained; it is in
            ``folder/moslora_checkpoint`` then.
        OSError: If it cannot be written.
        TypeError: If no model is given.
        ValueError: If a model carries no such adapter.
    """
    from peft import get_peft_model_state_dict

    if not models:
        raise TypeError("save_for_diffusers takes models by their names in the pipeline: unet=unet, …")
    parts = {
        component: Part(_config(component, model), get_peft_model_state_dict(model))
        for component, model in models.items()
    }
    path = Path(folder)

    def write_file(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> Mapping[str, Tensor]:
        text = json.dumps(metadata, indent=2, sort_keys=True)
        save_tensors(path / (name or DEFAULT_NAME), tensors, {"format": "pt", diffusers.METADATA: text})
        return tensors

    save(path, parts, write_file, name)


def resume_for_diffusers(folder: str | Path, *, name: str | None = None, **models: nn.Module) -> None:
    """Load what ``save_for_diffusers`` or a script of diffusers saved into models that carry the adapter already.

    Args:
        folder: Where it was saved.
        name: The file's name; None for diffusers' own.
        **models: By their names in the pipeline.

    Raises:
        AdapterError: If there is nothing for a model.
        TypeError: If no model is given.
        ValueError: If a model carries no such adapter, or another than was saved.
    """
    from peft import set_peft_model_state_dict

    if not models:
        raise TypeError("resume_for_diffusers takes models by their names in the pipeline: unet=unet, …")
    place = place_of(Path(folder), name)
    for component, model in models.items():
        _config(component, model)
        if not (place / component).is_dir():
            there = sorted(path.name for path in place.iterdir() if path.is_dir()) if place.is_dir() else []
            raise AdapterError(
                f"{place} has nothing for {component}; it has {', '.join(there) or 'nothing'}."
            )
    for component, model in models.items():
        set_peft_model_state_dict(model, native_tensors(place / component))


def _config(component: str, model: nn.Module) -> MoSLoRAConfig:
    configs: Any = getattr(model, "peft_config", {})
    config = configs.get("default")
    if not isinstance(config, MoSLoRAConfig):
        raise ValueError(
            f"{component} carries no MoSLoRA adapter of the name 'default'; it has {sorted(configs) or 'none'}. Add "
            f"one with {component}.add_adapter(MoSLoRAConfig(...))."
        )
    return config
