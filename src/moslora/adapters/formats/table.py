"""The table of adapter formats: how each is read, written and read back."""

from __future__ import annotations

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
    original,
    paddle,
    pipeline,
)
from moslora.adapters.formats.directory import CONFIG

__all__ = ["FORMATS", "WRITTEN", "Format"]


@dataclass(frozen=True)
class Format:
    """A file format of adapters.

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
        takes_base: Whether reading takes a ``base``, for starts that its weights tell, and ``say``.
    """

    read: Callable[..., Adapter] | None
    write: Callable[..., None] | None
    purpose: str
    warning: str = ""
    suffix: str = ""
    read_back: Callable[..., tuple[Adapter, str]] | None = None
    needs_base: bool = False
    takes_alpha: bool = False
    takes_base: bool = False


def _read_each(read: Callable[..., Adapter]) -> Callable[..., Adapter]:
    """Read an adapter directory, or one for each model of a pipeline; the weights of a pipeline tell no start."""

    def whole(path: Path, **about: Any) -> Adapter:
        parts = {} if (path / CONFIG).exists() else pipeline.folders(path)
        if parts:
            return pipeline.join({name: read(folder) for name, folder in parts.items()})
        return read(path, **about)

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
        takes_base=True,
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
    "original": Format(
        original.read,
        original.write,
        "with the names of the model's original code, as ComfyUI, ai-toolkit and DiffSynth-Studio have them",
        suffix=".safetensors",
        read_back=original.read_with_diffusers,
        takes_alpha=True,
    ),
    "official": Format(
        official.read, None, "of MoSLoRA's authors, or of PEFT pull request 2294", official.WARNING
    ),
    "paddle": Format(paddle.read, None, "of PaddleNLP"),
}
WRITTEN = tuple(sorted(name for name, format_ in FORMATS.items() if format_.write is not None))
