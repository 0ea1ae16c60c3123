"""The header of a safetensors file: what is in it and where, held against the file's size; no tensor is read."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moslora.files import kind_of_file
from moslora.wording import one_line

__all__ = ["Header", "StoredTensor", "read_header"]

LONGEST_HEADER = 100_000_000  # bytes; what the safetensors library takes
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
