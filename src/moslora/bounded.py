"""Files of others read within bounds: what a path is, texts, JSON, and the header of safetensors files.

A named pipe or a device may wait forever, and a file may be larger or nested deeper than anything that it claims to be.
"""

from __future__ import annotations

import json
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moslora.wording import one_line

__all__ = ["Header", "StoredTensor", "kind_of_file", "read_header", "read_json", "read_text"]

LONGEST_HEADER = 100_000_000  # bytes; what the safetensors library takes
LARGEST_JSON = 64 << 20  # bytes; an index of the shards of a huge model has some 10 MiB
MOST_DIMENSIONS = 64
# Bits of an element, by the format's names (safetensors 0.8). Another name is an error, as it is for the library.
BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


def kind_of_file(path: Path) -> str:
    """Return what a path is, if it is not an ordinary file: ``"a named pipe"``, ``"a folder"``, …; else an empty text.

    Args:
        path: Anything; links are followed.
    """
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 - takes names that are not paths too
    except (OSError, ValueError):
        return "missing"
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"))
    if stat.S_ISREG(mode):
        return ""
    return next((name for is_one, name in kinds if is_one(mode)), "a device")


def read_text(path: Path, most: int = 1 << 20) -> str:
    """Read a text file within bounds.

    Args:
        path: The file, in UTF-8.
        most: Bytes that it may have.

    Raises:
        ValueError: If it is not an ordinary file, larger, or not UTF-8.
        OSError: If it cannot be opened.
    """
    kind = kind_of_file(path)
    if kind not in ("", "missing"):
        raise ValueError(f"it is {kind}, not a file")
    with Path(path).open("rb") as file:
        text = file.read(most + 1)
    if len(text) > most:
        raise ValueError(f"it has more than {most >> 20} MiB")
    return text.decode("utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file of a configuration, within bounds.

    Args:
        path: The file.

    Raises:
        ValueError: If it is not JSON, not an ordinary file, larger than ``LARGEST_JSON``, or nested too deeply.
        OSError: If it cannot be opened.
    """
    try:
        return json.loads(read_text(path, LARGEST_JSON))
    except RecursionError:
        raise ValueError("it has too many nested levels") from None


# --- safetensors --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is in a safetensors file.

    Attributes:
        dtype: The format's name, such as ``"BF16"``.
        shape: Its shape.
        start: Offset of its first byte from the beginning of the file.
        end: Offset after its last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file.

    Attributes:
        tensors: By name, in the file's order.
        metadata: Its free text.
        length: Bytes of the header's JSON.
    """

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]
    length: int


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file, and check that every byte it names is there.

    Args:
        path: The file. Its tensors are not read.

    Raises:
        ValueError: If it is damaged or cut off; the message says how, without the path.
        OSError: If it cannot be read.
    """
    kind = kind_of_file(path)
    if kind not in ("", "missing"):
        raise ValueError(f"it is {kind}, not a file")
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise ValueError(f"its header would be {length} bytes long, and the file has {size}")
        text = file.read(length)
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_each_once)
        metadata = entries.pop("__metadata__", None) or {}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise TypeError("metadata must be texts")
        tensors = {
            name: StoredTensor(
                entry["dtype"],
                tuple(map(_natural, entry["shape"])),
                *(8 + length + _natural(offset) for offset in entry["data_offsets"]),
            )
            for name, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its header cannot be read ({type(error).__name__}: {one_line(error)})") from None
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if len(tensor.shape) > MOST_DIMENSIONS:
            raise ValueError(f"{one_line(name)} has {len(tensor.shape)} dimensions")
        if tensor.start != end or tensor.end < tensor.start:
            raise ValueError(f"{one_line(name)} begins at byte {tensor.start} instead of {end}")
        if tensor.dtype not in BITS:
            raise ValueError(f"{one_line(name)} has the unknown dtype {one_line(repr(tensor.dtype), 40)}")
        if math.prod(tensor.shape) * BITS[tensor.dtype] != 8 * (tensor.end - end):
            raise ValueError(
                f"{one_line(name)} has {tensor.end - end} bytes, which are not {tensor.dtype} of shape {tensor.shape}"
            )
        end = tensor.end
    if end != size:
        raise ValueError(f"it has {size} bytes, and its header says {end}")
    return Header(tensors, metadata, length)


def _natural(value: Any) -> int:
    """Return a whole number from 0; a fraction, a text or a truth value is not one."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise TypeError(f"{one_line(repr(value), 40)} is not a whole number from 0 to 2^63")
    return value


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON, in which a name that occurs twice is an error."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found
