"""A safetensors file of an adapter: checked when it is read, the same bytes when it is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moslora.bounded import Header, read_header
from moslora.core.finite import all_finite
from moslora.errors import AdapterError

__all__ = ["check_tensors", "load_tensors", "read_whole_header", "save_tensors"]


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Args:
        path: The file.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        AdapterError: If the file is damaged, or holds empty or non-finite tensors.
    """
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise AdapterError(
            f"{path} is damaged or cut off: {error}. Copy it again, or take an earlier checkpoint."
        ) from error
    return check_tensors(path, tensors)


def read_whole_header(path: Path) -> Header:
    """Read the header of a safetensors file, without its tensors.

    Args:
        path: The file.

    Returns:
        The names of its tensors, and its metadata.

    Raises:
        AdapterError: If it is damaged.
    """
    try:
        return read_header(path)
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{path} is damaged or cut off: {error}. Copy it again, or take an earlier checkpoint."
        ) from error


def check_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Refuse tensors that no adapter can be made of.

    Args:
        path: Where they come from, for messages.
        tensors: Tensors by name.

    Returns:
        The same tensors.

    Raises:
        AdapterError: If there are none, or one is empty or has NaN or infinite values.
    """
    if not tensors:
        raise AdapterError(f"{path} holds no tensors.")
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            raise AdapterError(
                f"{path}: {name} is empty, shape {tuple(tensor.shape)}. It was saved under sharding (ZeRO-3, "
                "FSDP) without gathering; gather the parameters and save again."
            )
        if tensor.is_floating_point() and torch.finfo(tensor.dtype).bits < 16:
            raise AdapterError(
                f"{path}: {name} is {tensor.dtype}, and factors of 8 bits are not read. Convert the file to float16 "
                "in the program that wrote it; that loses nothing."
            )
        if tensor.is_complex():
            raise AdapterError(f"{path}: {name} is {tensor.dtype}, which no adapter has.")
        if tensor.is_floating_point() and not all_finite(tensor):
            raise AdapterError(
                f"{path}: {name} has NaN or infinite values: the training diverged, or the file is "
                "damaged. Take an earlier checkpoint."
            )
    return tensors


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file; the same tensors always give the same bytes.

    Args:
        path: The file.
        tensors: Tensors by name.
        metadata: Text by key.

    Raises:
        OSError: If the disk is full or the place not writable.
    """
    # Sorted, and each its own memory.
    ready = {name: tensors[name].detach().cpu().contiguous().clone() for name in sorted(tensors)}
    try:
        save_file(ready, path, metadata=metadata)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(str(error)) from error
    if len(metadata) > 1:
        _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file; its writer leaves the order to chance."""
    header = read_header(path)
    begin = 8 + header.length
    entries: dict[str, Any] = {"__metadata__": dict(sorted(header.metadata.items()))}
    for name, tensor in header.tensors.items():
        offsets = [tensor.start - begin, tensor.end - begin]
        entries[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode().ljust(header.length)
    if len(text) != header.length:
        raise OSError(f"{path}: its header of {header.length} bytes has {len(text)} after sorting.")
    with path.open("r+b") as file:
        file.seek(8)
        file.write(text)
