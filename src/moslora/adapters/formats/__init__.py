"""One file per adapter format, each with ``read`` and/or ``write``, and the table that names them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moslora.adapters.factors import Adapter
from moslora.adapters.formats import (
    diffusers,
    gguf,
    kohya,
    lora,
    native,
    official,
    paddle,
    pipeline,
    pipeline_checkpoint,
)
from moslora.adapters.formats.directory import CONFIG, WEIGHTS, read_config, read_header
from moslora.errors import AdapterError

__all__ = ["FORMATS", "WRITTEN", "Format", "detect", "read_adapter"]


@dataclass(frozen=True)
class Format:
    """A way for an adapter to lie on disk.

    Attributes:
        read: Reads a directory or a file; None for formats that are only written.
        write: Writes into an existing, empty directory, or to a path where nothing is; None for formats that are
            only read. Takes ``dtype``, and ``base`` where that is needed.
        purpose: Who reads it, or what it is.
        warning: What its user must know.
        suffix: Of the file, where the format is a single one.
        read_back: Reads what was written through another project's reader, given what it was written from; None
            where there is none.
        needs_base: Whether writing takes the base's ``config.json``, as ``base``.
        takes_alpha: Whether reading takes an ``alpha`` for files that do not say theirs.
    """

    read: Callable[..., Adapter] | None
    write: Callable[..., None] | None
    purpose: str
    warning: str = ""
    suffix: str = ""
    read_back: Callable[..., tuple[Adapter, str]] | None = None
    needs_base: bool = False
    takes_alpha: bool = False


def _read_each(read: Callable[[Path], Adapter]) -> Callable[[Path], Adapter]:
    """Read an adapter directory, or one for each model of a pipeline."""

    def whole(path: Path) -> Adapter:
        parts = {} if (path / CONFIG).exists() else pipeline.folders(path)
        return pipeline.join({name: read(folder) for name, folder in parts.items()}) if parts else read(path)

    return whole


def _write_each(write: Callable[..., None]) -> Callable[..., None]:
    """Write an adapter directory, or one for each model of a pipeline."""

    def whole(adapter: Adapter, path: Path, **options: Any) -> None:
        if "components" not in adapter.config:
            write(adapter, path, **options)
            return
        for name, part in pipeline.split(adapter).items():
            (path / name).mkdir()
            write(part, path / name, **options)

    return whole


def _peft_reads_each(path: Path, like: Adapter) -> tuple[Adapter, str]:
    """Read back a plain LoRA directory, or one for each model of a pipeline, through PEFT."""
    if "components" not in like.config:
        return lora.read_with_peft(path, like)
    found = {name: lora.read_with_peft(path / name, part) for name, part in pipeline.split(like).items()}
    readers = {reader for _, reader in found.values()}
    return pipeline.join({name: part for name, (part, _) in found.items()}), readers.pop()


FORMATS: dict[str, Format] = {
    "lora": Format(
        _read_each(lora.read),
        _write_each(lora.write),
        "plain LoRA: PEFT and everything that reads it",
        read_back=_peft_reads_each,
    ),
    "native": Format(
        _read_each(native.read), _write_each(native.write), "with its mixers, to continue training"
    ),
    "gguf": Format(
        None,
        gguf.write,
        "for llama.cpp and what is built on it",
        suffix=".gguf",
        read_back=gguf.read_with_gguf,
        needs_base=True,
    ),
    "diffusers": Format(
        diffusers.read,
        diffusers.write,
        "for load_lora_weights of a diffusers pipeline, and for ComfyUI where that is FLUX or SD3",
        suffix=".safetensors",
        read_back=diffusers.read_with_diffusers,
        takes_alpha=True,
    ),
    "kohya": Format(
        kohya.read,
        kohya.write,
        "for ComfyUI, A1111 and sd-scripts",
        suffix=".safetensors",
        read_back=kohya.read_with_diffusers,
        takes_alpha=True,
    ),
    "official": Format(
        official.read, None, "of MoSLoRA's authors, or of PEFT pull request 2294", official.WARNING
    ),
    "paddle": Format(paddle.read, None, "of PaddleNLP"),
}
WRITTEN = tuple(sorted(name for name, format_ in FORMATS.items() if format_.write is not None))
TYPES = {lora.PEFT_TYPE: "lora", native.PEFT_TYPE: "native"}
# What diffusers names a file that it saves into a directory; the authors' SDXL script saved so too.
IMAGE_WEIGHTS = "pytorch_lora_weights.safetensors"


def detect(path: Path) -> str:
    """Tell the format of an adapter.

    Args:
        path: Its directory, or its file where it is a single one.

    Returns:
        A key of ``FORMATS``.

    Raises:
        AdapterError: If it is no adapter, or of another method.
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
    found = read_config(path)["peft_type"]
    if found not in TYPES:
        known = ", ".join(sorted(TYPES))
        raise AdapterError(f"{path} is an adapter of type {found}; only {known} can be read.")
    return "official" if TYPES[found] == "lora" and official.carries_mixer(path) else TYPES[found]


def _detect_file(path: Path) -> str:
    if path.suffix == ".gguf":
        raise AdapterError(f"{path} is GGUF, which is written here but not read. Give what it was made from.")
    if path.name in (CONFIG, WEIGHTS, official.PICKLED):
        raise AdapterError(
            f"{path} is a file; give the adapter's directory, {path.parent}, which holds {CONFIG}."
        )
    if path.suffix != ".safetensors":
        raise AdapterError(
            f"{path} is a file; an adapter is a directory, or one .safetensors file of diffusers or kohya. "
            "Pickles (.pt, .ckpt) are not opened."
        )
    names, _ = read_header(path)
    if kohya.is_kohya(names):
        return "kohya"
    if diffusers.is_diffusers(names):
        return "diffusers"
    if any(".moslora_" in name for name in names):
        raise AdapterError(
            f"{path} has factors of MoSLoRA, but not the name of the model that they are for, as {names[0]!r}. Save "
            "it with moslora.save_for_diffusers(folder, unet=unet) or the pipeline's save_lora_weights, or a PeftModel "
            "with save_pretrained."
        )
    example = f", as {names[0]!r}" if names else ""
    raise AdapterError(
        f"{path} has no names of diffusers' or kohya's LoRA files{example}. If it belongs to a PEFT adapter, give the "
        f"directory with its {CONFIG}."
    )


def read_adapter(path: str | Path, alpha: float | None = None) -> Adapter:
    """Read an adapter of any format that is read.

    Args:
        path: Its directory, or its file where it is a single one.
        alpha: The ``lora_alpha`` that it was trained with, for a file that does not say it; the scale of a module is
            then alpha ÷ its rank.

    Returns:
        The adapter.

    Raises:
        AdapterError: If it cannot be read or trusted, or says its alpha itself and one is given; the message says what
            to do.
        ValueError: If ``alpha`` is not a finite number other than 0.
    """
    path = Path(path)
    found = detect(path)
    read = FORMATS[found].read
    assert read is not None, "what is detected is read"
    if alpha is None:
        return read(path)
    if not math.isfinite(alpha) or alpha == 0:
        raise ValueError(f"alpha={alpha!r} is not an alpha; it must be a finite number other than 0.")
    if not FORMATS[found].takes_alpha:
        raise AdapterError(f"{path} is {found}, whose configuration says its alpha. Leave --alpha out.")
    return read(path, alpha)
