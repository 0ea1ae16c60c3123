"""Detect the format of an adapter, and read it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moslora.adapters.factors import Adapter
from moslora.adapters.formats import (
    diffusers,
    image_file,
    lora,
    native,
    official,
    paddle,
    pipeline,
    pipeline_checkpoint,
    strangers,
)
from moslora.adapters.formats.directory import CONFIG, WEIGHTS, read_config
from moslora.adapters.formats.table import FORMATS
from moslora.adapters.formats.tensors import read_whole_header
from moslora.errors import AdapterError, UsageError
from moslora.files import refuse_undecodable

__all__ = ["detect", "read_adapter"]


TYPES = {lora.PEFT_TYPE: "lora", native.PEFT_TYPE: "native"}
# What diffusers names a file that it saves into a directory; the authors' SDXL script saved so too.
IMAGE_WEIGHTS = "pytorch_lora_weights.safetensors"
# What a directory of a whole model has, a pipeline's or a language model's.
MODELS = ("model_index.json", "diffusion_pytorch_model.safetensors", "model.safetensors", "pytorch_model.bin")


def detect(path: Path) -> str:
    """Tell the format of an adapter.

    Args:
        path: Its directory, or its file where it is a single one.

    Returns:
        A key of ``FORMATS``.

    Raises:
        AdapterError: If it is not an adapter, or of another method.
    """
    if path.is_file():
        return _detect_file(path)
    if (path / paddle.CONFIG).is_file() and not (path / CONFIG).exists():
        return "paddle"
    if not (path / CONFIG).exists():
        parts = pipeline.folders(path)
        kinds = {name: detect(folder) for name, folder in parts.items()}
        if len(set(kinds.values())) > 1:
            raise AdapterError(f"{path} has adapters of several formats, {kinds}. Convert them one by one.")
        if kinds:
            return next(iter(kinds.values()))
        if (path / IMAGE_WEIGHTS).is_file():
            beside = path / pipeline_checkpoint.FOLDER
            mixers = f", or with its mixers {beside}" if beside.is_dir() else ""
            raise AdapterError(
                f"{path} is a directory of diffusers; give its file, {path / IMAGE_WEIGHTS}{mixers}."
            )
        _refuse_directory(path)
    found = read_config(path)["peft_type"]
    if found not in TYPES:
        known = ", ".join(sorted(TYPES))
        raise AdapterError(f"{path} is an adapter of type {found}; only {known} can be read.")
    return "official" if TYPES[found] == "lora" and official.carries_mixer(path) else TYPES[found]


def _refuse_directory(path: Path) -> None:
    """Say what a directory without an adapter's configuration is, where that is plain."""
    files = sorted(path.glob("*.safetensors"))
    adapters = [file for file in files if _is_adapter(file)]
    if adapters:
        raise AdapterError(f"{path} is not an adapter directory; give its file, {adapters[0]}.")
    whole = [name for name in MODELS if (path / name).is_file()] or [
        p.name for p in path.glob("*.index.json")
    ]
    if whole:
        raise AdapterError(
            f"{path} holds a whole model ({whole[0]}), not an adapter of one. Give the directory of the adapter, which "
            f"holds {CONFIG}."
        )


def _is_adapter(file: Path) -> bool:
    try:
        return bool(_detect_file(file))
    except AdapterError:
        return False


def _detect_file(path: Path) -> str:
    if path.name in (CONFIG, WEIGHTS, official.PICKLED):
        raise AdapterError(
            f"{path} is a file; give the adapter's directory, {path.parent}, which holds {CONFIG}."
        )
    kind = strangers.describe_bytes(path)
    if kind:
        raise AdapterError(f"{path} is {kind}")
    if path.name.endswith(".index.json"):
        raise AdapterError(
            f"{path} is the index of a model in several files, and its weights are not an adapter. Give the directory "
            f"of an adapter, which holds {CONFIG}."
        )
    if path.suffix != ".safetensors":
        raise AdapterError(
            f"{path} is a file; an adapter is a directory, or one .safetensors file of diffusers, kohya or another "
            "image tool."
        )
    names = list(read_whole_header(path).tensors)
    if diffusers.is_diffusers(names):
        return "diffusers"
    if image_file.is_image_file(names):
        return "kohya" if image_file.is_flat(names) else "original"
    if any(".moslora_" in name for name in names):
        raise AdapterError(
            f"{path} has factors of MoSLoRA, but not the name of the model that they are for, as {names[0]!r}. Save "
            "it with moslora.save_for_diffusers(folder, unet=unet) or the pipeline's save_lora_weights, or a PeftModel "
            "with save_pretrained."
        )
    raise AdapterError(f"{path} {strangers.describe_tensors(names, CONFIG)}")


def read_adapter(
    path: str | Path,
    alpha: float | None = None,
    base: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Adapter:
    """Read an adapter of any format that is read.

    Args:
        path: Its directory, or its file where it is a single one.
        alpha: The ``lora_alpha`` that it was trained with, for a file that does not say it; the scale of a module is
            then alpha ÷ its rank.
        base: The base that it was trained on, for a start that PEFT took out of it and that its file does not hold;
            None for the one that the adapter names, where that is a folder.
        say: Receives a line before long work.

    Returns:
        The adapter.

    Raises:
        AdapterError: If it cannot be read or trusted, or says its alpha itself and one is given; the message says what
            to do.
        ModelError, ProofError: If its start has to be computed from the base, and cannot be.
        UsageError: If ``alpha`` is not a finite number other than 0, or the path is not UTF-8.
    """
    path = Path(path)
    found = detect(path)
    refuse_undecodable(path)
    read = FORMATS[found].read
    assert read is not None, "what is detected is read"
    about: dict[str, Any] = {"base": base, "say": say} if FORMATS[found].takes_base else {}
    if alpha is None:
        return read(path, **about)
    if not math.isfinite(alpha) or alpha == 0:
        raise UsageError(f"alpha={alpha!r} is not an alpha; it must be a finite number other than 0.")
    if not FORMATS[found].takes_alpha:
        raise AdapterError(f"{path} is {found}, whose configuration says its alpha. Leave --alpha out.")
    return read(path, alpha)
