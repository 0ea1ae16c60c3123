"""One file per adapter format, each with ``read`` and/or ``write``, and the table that names them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moslora.adapter import Adapter, AdapterError
from moslora.formats import lora, native, official, paddle
from moslora.formats.directory import CONFIG, read_config

__all__ = ["FORMATS", "WRITTEN", "Format", "detect", "read_adapter"]


@dataclass(frozen=True)
class Format:
    """A way for an adapter to lie on disk.

    Attributes:
        read: Reads a directory.
        write: Writes into an existing, empty directory; None for formats that are only read.
        purpose: Who reads it, or what it is.
        warning: What its user must know.
    """

    read: Callable[[Path], Adapter]
    write: Callable[[Adapter, Path], None] | None
    purpose: str
    warning: str = ""


FORMATS: dict[str, Format] = {
    "lora": Format(lora.read, lora.write, "plain LoRA: PEFT and everything that reads it"),
    "native": Format(native.read, native.write, "with its mixers, to continue training"),
    "official": Format(
        official.read, None, "of MoSLoRA's authors, or of PEFT pull request 2294", official.WARNING
    ),
    "paddle": Format(paddle.read, None, "of PaddleNLP"),
}
WRITTEN = tuple(sorted(name for name, format_ in FORMATS.items() if format_.write is not None))
TYPES = {lora.PEFT_TYPE: "lora", native.PEFT_TYPE: "native"}


def detect(folder: Path) -> str:
    """Tell the format of an adapter directory.

    Args:
        folder: The directory.

    Returns:
        A key of ``FORMATS``.

    Raises:
        AdapterError: If it is no adapter directory, or of another method.
    """
    if (folder / paddle.CONFIG).is_file() and not (folder / CONFIG).exists():
        return "paddle"
    found = read_config(folder)["peft_type"]
    if found not in TYPES:
        known = ", ".join(sorted(TYPES))
        raise AdapterError(f"{folder} is an adapter of type {found}; only {known} can be read.")
    return "official" if TYPES[found] == "lora" and official.carries_mixer(folder) else TYPES[found]


def read_adapter(folder: str | Path) -> Adapter:
    """Read an adapter directory of any known format.

    Args:
        folder: The directory.

    Returns:
        The adapter.

    Raises:
        AdapterError: If it cannot be read or trusted; the message says what to do.
    """
    return FORMATS[detect(Path(folder))].read(Path(folder))
