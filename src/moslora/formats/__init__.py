"""One file per adapter format, each with ``read`` and/or ``write``, and the table that names them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moslora.adapter import Adapter, AdapterError
from moslora.formats import lora, native
from moslora.formats.directory import read_config

__all__ = ["FORMATS", "Format", "detect", "read_adapter"]


@dataclass(frozen=True)
class Format:
    """A way for an adapter to lie on disk.

    Attributes:
        read: Reads a directory.
        write: Writes into an existing, empty directory.
        peft_type: What ``adapter_config.json`` says.
        purpose: Who reads it.
    """

    read: Callable[[Path], Adapter]
    write: Callable[[Adapter, Path], None]
    peft_type: str
    purpose: str


FORMATS: dict[str, Format] = {
    "lora": Format(lora.read, lora.write, lora.PEFT_TYPE, "plain LoRA: PEFT and everything that reads it"),
    "native": Format(native.read, native.write, native.PEFT_TYPE, "with its mixers, to continue training"),
}


def detect(folder: Path) -> str:
    """Tell the format of an adapter directory.

    Args:
        folder: The directory.

    Returns:
        A key of ``FORMATS``.

    Raises:
        AdapterError: If it is no adapter directory, or of another method.
    """
    found = read_config(folder)["peft_type"]
    for name, format_ in FORMATS.items():
        if format_.peft_type == found:
            return name
    known = ", ".join(sorted(f.peft_type for f in FORMATS.values()))
    raise AdapterError(f"{folder} is an adapter of type {found}; only {known} can be read.")


def read_adapter(folder: str | Path) -> Adapter:
    """Read an adapter directory of any known format.

    Args:
        folder: The directory, native or plain LoRA.

    Returns:
        The adapter.

    Raises:
        AdapterError: If it cannot be read or trusted; the message says what to do.
    """
    return FORMATS[detect(Path(folder))].read(Path(folder))
