"""The native format: what ``save_pretrained`` writes, mixers and all, to continue training.

``peft_type`` is ``MOSLORA`` and the tensors are ``moslora_A``, ``moslora_M``, ``moslora_B``, so that a
program without this package finds nothing it knows, rather than half.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moslora.adapter import Adapter, AdapterError
from moslora.formats.directory import (
    SHARED,
    WEIGHTS,
    build_adapter,
    group_factors,
    name_all,
    read_config,
    read_tensors,
    settle,
    write_files,
)
from moslora.tuner.config import MoSLoRAConfig

__all__ = ["PEFT_TYPE", "read", "write"]

PEFT_TYPE = "MOSLORA"
MAGNITUDE = "moslora_magnitude"
PARTS = {"moslora_A": "A", "moslora_M": "M", "moslora_B": "B"}
EMBEDDING_PARTS = {"moslora_embedding_A": "A", "moslora_embedding_M": "M", "moslora_embedding_B": "B"}
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
    found = group_factors(read_tensors(folder), {**PARTS, MAGNITUDE: "magnitude"}, EMBEDDING_PARTS)
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
    named = name_all(adapter.modules, PARTS, EMBEDDING_PARTS, f"{MAGNITUDE}.weight")
    tensors.update({key: tensor.to(dtype or tensor.dtype) for key, tensor in named.items()})
    write_files(folder, config.to_dict(), tensors)
