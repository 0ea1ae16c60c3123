"""Base pipelines: finding one by its name, reading its configuration, and loading its models.

A pipeline is loaded whole or not at all. Nothing here needs a recipe::

    files = open_pipeline(find_pipeline("my-pipeline"))
    pipeline = load_pipeline(files, device="cpu")
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.errors import ModelError, RecipeError, UsageError
from moslora.files import sha256
from moslora.models.fingerprint import HASH_LIMIT, header_sha256, hub_commit
from moslora.models.loading import call_loader, check_loaded, quiet_transformers
from moslora.models.names import HUB_ID, ModelSource, not_found_message, read_json
from moslora.tasks.image.families.family import Family
from moslora.tasks.image.families.table import FAMILIES
from moslora.wording import first_line

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = [
    "PipelineFiles",
    "check_variant",
    "download_weights",
    "find_pipeline",
    "load_pipeline",
    "open_pipeline",
]

INDEX = "model_index.json"
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # parts that training does not need


# --- Before any weight is read ------------------------------------------------------------------------------


def find_pipeline(name: str, revision: str | None = None) -> ModelSource:
    """Find out what a pipeline's name means. Looks at file names only.

    Args:
        name: A diffusers folder, or a hub id ``org/name``.
        revision: Branch, tag or commit of a hub id.

    Returns:
        The pipeline's place.

    Raises:
        ModelError: If it does not exist, or is not a pipeline.
    """
    path = Path(os.path.expanduser(name))  # noqa: PTH111 - Path's raises for a user that does not exist
    if os.path.isdir(path):  # noqa: PTH112 - Path's raises for a name that is too long
        if not (path / INDEX).is_file():
            inside = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
            raise ModelError(
                f"{path} is not a diffusers pipeline: it has no {INDEX} (it has: {inside}). Convert a single "
                "checkpoint file with StableDiffusionXLPipeline.from_single_file(…).save_pretrained(…)."
            )
        if revision is not None:
            raise ModelError(
                f"model.revision={revision!r} does not apply to {name}: only hub ids have revisions."
            )
        return ModelSource(name, "folder", str(path.absolute()))
    if path.is_file():
        raise ModelError(
            f"{name} is a file. Convert it to a folder first: StableDiffusionXLPipeline.from_single_file(…)"
            ".save_pretrained(…), or the class of its family."
        )
    if HUB_ID.fullmatch(name):
        return ModelSource(name, "hub", name, revision=revision)
    raise ModelError(not_found_message(name, path))


@dataclass(frozen=True)
class PipelineFiles:
    """The files of a pipeline on this machine.

    Attributes:
        source: What the pipeline's name means.
        folder: Where its files are; of a hub id only the configurations, until ``download_weights``.
        index: The content of ``model_index.json``.
        kind: Its class in diffusers.
        family: What is particular to that class.
    """

    source: ModelSource
    folder: Path
    index: dict[str, Any]
    kind: str
    family: Family

    def has(self, part: str) -> bool:
        """Return whether the pipeline has a model of this name."""
        return all(self.index.get(part) or [None])

    def config(self, part: str) -> dict[str, Any]:
        """Return the configuration of one of its models."""
        return read_json(self.folder / part / "config.json")

    def skeleton(self, part: str) -> nn.Module:
        """Build one of its models on the meta device, from its configuration alone."""
        from accelerate import init_empty_weights
        from diffusers import ConfigMixin

        kind = _class(self.index[part])
        with init_empty_weights():
            if issubclass(kind, ConfigMixin):
                model: nn.Module = kind.from_config(kind.load_config(self.folder / part))
            else:
                model = kind(kind.config_class.from_pretrained(self.folder / part))
        return model

    def resolution(self, wanted: int | None = None) -> int:
        """Return the side of training pictures in pixels.

        Args:
            wanted: The recipe's; None takes the size that the denoiser was trained on.

        Raises:
            RecipeError: If the pipeline cannot process pictures of the wanted size.
        """
        from moslora.tasks.image.autoencoders import latent_factor

        denoiser = self.config(self.family.denoiser)
        factor = latent_factor(self.config("vae"))
        if wanted is None:
            size = denoiser.get("sample_size")
            # Transformers that do not say a size were trained on about a million pixels.
            wanted = int(size if isinstance(size, int) else size[0]) * factor if size else 1024
        if wanted % self.step:
            raise RecipeError(
                f"data.resolution={wanted} is not a multiple of {self.step}, which {self.source.name} needs."
            )
        return wanted

    @property
    def step(self) -> int:
        """Of how many pixels the sides of pictures must be a multiple."""
        from moslora.tasks.image.autoencoders import latent_factor

        patch = int(self.config(self.family.denoiser).get("patch_size") or 1)
        return latent_factor(self.config("vae")) * max(self.family.multiple, patch)

    def fingerprint(self) -> dict[str, Any]:
        """Return what identifies the base: the hub's commit, or hashes of its files."""
        identity: dict[str, Any] = {"kind": self.source.kind, "name": self.source.name}
        if self.source.kind == "hub":
            return {**identity, "method": "commit", "commit": hub_commit(self.source, INDEX)}
        weights = sorted(self.folder.glob("*/*.safetensors"))
        whole = sum(path.stat().st_size for path in weights) <= HASH_LIMIT
        files = {
            str(path.relative_to(self.folder)): sha256(path) if whole else header_sha256(path)
            for path in weights
        }
        configs = [self.folder / INDEX, *sorted(self.folder.glob("*/*.json"))]
        files |= {str(path.relative_to(self.folder)): sha256(path) for path in configs}
        return {**identity, "method": "sha256" if whole else "sha256-of-headers", "files": files}


def open_pipeline(source: ModelSource) -> PipelineFiles:
    """Read a pipeline's configuration; of a hub id it is downloaded, and no weights are.

    Args:
        source: From ``find_pipeline``.

    Raises:
        ModelError: If it cannot be read.
        UsageError: If pipelines of this class cannot be trained.
    """
    folder = _configs(source)
    index = read_json(folder / INDEX)
    kind = str(index.get("_class_name"))
    if kind not in FAMILIES:
        raise UsageError(
            f"{source.name} is a {kind}; task=image trains {', '.join(FAMILIES)}. Others take other inputs, "
            "and would be trained wrongly."
        )
    return PipelineFiles(source, folder, index, kind, FAMILIES[kind])


def _configs(source: ModelSource) -> Path:
    """Return a folder with the pipeline's configurations."""
    if source.kind == "folder":
        return Path(source.path)
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.txt", "*.model"]
        return Path(snapshot_download(source.path, revision=source.revision, allow_patterns=patterns))
    except Exception as error:
        raise ModelError(
            f"{source.name} cannot be read: {first_line(error)} Is the id right, and is there a network?"
        ) from error


def _class(entry: Sequence[str]) -> Any:
    """Return the class that an entry of a pipeline's index names."""
    return getattr(importlib.import_module(entry[0]), entry[1])


# --- Weights ------------------------------------------------------------------------------------------------


def download_weights(files: PipelineFiles, variant: str | None = None) -> PipelineFiles:
    """Download a pipeline's weights; a folder's are there already.

    Args:
        files: From ``open_pipeline``.
        variant: Which files, as ``fp16``; None for the plain ones.

    Returns:
        The files, where the weights are.

    Raises:
        ModelError: If they cannot be downloaded.
    """
    if files.source.kind != "hub":
        return files
    from diffusers import DiffusionPipeline

    options = {"revision": files.source.revision} if files.source.revision else {}
    options |= {"variant": variant} if variant else {}
    folder = call_loader(files.source, DiffusionPipeline.download, {**options, "use_safetensors": True})
    return dataclasses.replace(files, folder=Path(folder))


def check_variant(files: PipelineFiles, variant: str | None) -> None:
    """Refuse a pipeline that has no file of the wanted variant.

    Args:
        files: With weights.
        variant: Which files, as ``fp16``; None for the plain ones.

    Raises:
        ModelError: If there is none; names the variants that there are.
    """
    variants = {
        name.rpartition(".")[2] if "." in name else ""
        for path in files.folder.glob("*/*.safetensors")
        for name in [re.sub(r"-\d{5}-of-\d{5}", "", path.stem)]
    }
    if variants and (variant or "") not in variants:
        listed = ", ".join(sorted(name or "null" for name in variants))
        raise ModelError(
            f"{files.source.name} has no weights of model.variant={variant or 'null'}; it has {listed}."
        )


def load_pipeline(
    files: PipelineFiles,
    device: str,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    say: Callable[[str], None] = lambda text: None,
    checkpoint: Callable[[], None] = lambda: None,
) -> Any:
    """Load every model of a pipeline whole or not at all, frozen and in evaluation mode.

    Args:
        files: With weights.
        device: Where the models go.
        dtype: Of the weights; None is float32. The VAE is always float32, as SDXL's overflows in float16.
        variant: Which files, as ``fp16``; None for the plain ones. A part without it is loaded from its plain ones.
        say: Told of such parts.
        checkpoint: Called after each part.

    Returns:
        The pipeline, without a safety checker and without a progress bar.

    Raises:
        ModelError: If a part cannot be loaded, lacks weights, or no part has the variant.
    """
    import diffusers
    import torch

    check_variant(files, variant)
    parts: dict[str, Any] = {}
    for name, entry in files.index.items():
        if name.startswith("_"):
            continue
        if not isinstance(entry, list):
            parts[name] = entry  # a setting of the pipeline itself
        elif entry[0] is None or name in UNUSED:
            parts[name] = None
        else:
            part_dtype = torch.float32 if name == "vae" or dtype is None else dtype
            parts[name] = _load_part(files, name, device, part_dtype, variant, say)
            checkpoint()
    if files.kind == "StableDiffusionPipeline":
        parts["requires_safety_checker"] = False
    with quiet_transformers():  # it reports that image processors, not used here, want torchvision
        pipeline = getattr(diffusers, files.kind)(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _load_part(
    files: PipelineFiles,
    name: str,
    device: str,
    dtype: torch.dtype,
    variant: str | None,
    say: Callable[[str], None],
) -> Any:
    """Load one part of a pipeline: a model, a tokenizer or a scheduler."""
    from torch import nn

    kind = _class(files.index[name])
    place = ModelSource(f"{files.source.name}/{name}", "folder", str(files.folder / name))
    if not issubclass(kind, nn.Module):
        return call_loader(place, kind.from_pretrained, {})
    options: dict[str, Any] = {
        "torch_dtype" if kind.__module__.startswith("diffusers") else "dtype": dtype,
        "use_safetensors": True,
        "output_loading_info": True,
    }
    if variant is not None:  # loaded where the part has it, as diffusers does
        if any((files.folder / name).glob(f"*.{variant}*.safetensors")):
            options["variant"] = variant
        else:
            say(f"{name} has no files of model.variant={variant}; its plain ones are loaded.")
    model, info = call_loader(place, kind.from_pretrained, options)
    check_loaded(place, info)
    return model.to(device).eval().requires_grad_(False)
