"""The native format: what ``save_pretrained`` writes, mixers and all, to continue training.

``peft_type`` is ``MOSLORA`` and the tensors are ``moslora_A``, ``moslora_M``, ``moslora_B``, so that a
program without this package finds nothing it knows, rather than half.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moslora.adapter import Adapter, AdapterError
from moslora.formats.directory import (
    SHARED,
    WEIGHTS,
    build_adapter,
    group_factors,
    load_tensors,
    name_all,
    read_config,
    read_header,
    read_tensors,
    settle,
    write_files,
)
from moslora.tuner.config import MoSLoRAConfig

__all__ = ["PEFT_TYPE", "START", "keep_start", "read", "read_start", "start_of", "write"]

PEFT_TYPE = "MOSLORA"
PARTS = {"moslora_A": "A", "moslora_M": "M", "moslora_B": "B"}
EMBEDDING_PARTS = {"moslora_embedding_A": "A", "moslora_embedding_M": "M", "moslora_embedding_B": "B"}
# What the mixers started as, beside the adapter that they became; a file of its own, which no loader looks for.
START = "moslora_start.safetensors"
OWN = ("mixer", "train_mixer", "match_scale", "unlike_lora")


def read(folder: Path) -> Adapter:
    """Read a native adapter directory.

    Args:
        folder: The directory.

    Returns:
        The adapter, in the dtype of the file.

    Raises:
        AdapterError: If it is not a whole, finite MoSLoRA adapter.
    """
    config = read_config(folder)
    if config["peft_type"] != PEFT_TYPE:
        raise AdapterError(f"{folder} is of type {config['peft_type']}, not {PEFT_TYPE}.")
    found = group_factors(read_tensors(folder), PARTS, EMBEDDING_PARTS)
    strange = [key for key in found.rest if "moslora_" in key]
    if strange:
        raise AdapterError(f"{folder / WEIGHTS} holds tensors of an unknown form: {strange[:3]}.")
    without = [name for name, factors in found.modules.items() if "M" not in factors]
    if without:
        raise AdapterError(f"{folder / WEIGHTS}: {without[0]} lacks its mixer, moslora_M.")
    kept = {name: config[name] for name in (*SHARED, *OWN) if name in config}
    return build_adapter(folder, kept, found)


def write(adapter: Adapter, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write a native adapter directory.

    Args:
        adapter: The adapter. A plain LoRA gets an identity mixer.
        folder: An existing, empty directory.
        dtype: Of the factors; None for their own.

    Raises:
        AdapterError: If its configuration is none that can be trained with a mixer.
        OSError: If it cannot be written.
    """
    values: dict[str, Any] = settle(adapter)
    values.setdefault("mixer", "identity")
    if values.get("bias") == "lora_only":
        values["bias"] = "moslora_only"
    try:
        config = MoSLoRAConfig(inference_mode=True, **values)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"The adapter's configuration has no native form: {error}") from error
    tensors = dict(adapter.extra)
    named = name_all(adapter.modules, PARTS, EMBEDDING_PARTS)
    tensors.update({key: tensor.to(dtype or tensor.dtype) for key, tensor in named.items()})
    write_files(folder, config.to_dict(), tensors)


def keep_start(folder: Path, mixers: Mapping[str, Tensor]) -> None:
    """Keep beside an adapter what its mixers started as.

    Args:
        folder: The adapter's directory, its tensors written.
        mixers: M0, shape ``(r, r)``, by module path.

    Raises:
        OSError: If it cannot be written.
    """
    whole = {name: tensor.contiguous() for name, tensor in mixers.items()}
    save_file(whole, folder / START, metadata={"of": _digest(folder)})


def read_start(path: Path) -> dict[str, Tensor]:
    """Read a file of mixers.

    Args:
        path: A safetensors file, M0 by module path.

    Returns:
        What ``keep_start`` takes.

    Raises:
        AdapterError: If it is damaged.
    """
    return load_tensors(path)


def start_of(folder: Path) -> dict[str, Tensor] | None:
    """Return what an adapter's mixers started as, where that is known.

    It is not where the tensors beside it are others than those it was kept for: an adapter that was trained further, or
    another one saved to the same place, has moved from somewhere else.

    Args:
        folder: The adapter's directory.

    Returns:
        M0, shape ``(r, r)``, by module path; None where it was not kept, or for other tensors.

    Raises:
        AdapterError: If the file is damaged.
    """
    path = folder / START
    if not path.is_file() or not (folder / WEIGHTS).is_file():
        return None
    _, about = read_header(path)
    return read_start(path) if about.get("of") == _digest(folder) else None


def _digest(folder: Path) -> str:
    with (folder / WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
