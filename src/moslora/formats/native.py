"""The native format: what ``save_pretrained`` writes, mixers and all, to continue training.

``peft_type`` is ``MOSLORA`` and the tensors are ``moslora_A``, ``moslora_M``, ``moslora_B``, so that a
program without this package finds nothing it knows, rather than half.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moslora.adapter import Adapter, AdapterError
from moslora.formats.directory import (
    SHARED,
    WEIGHTS,
    build_adapter,
    group_factors,
    name_tensors,
    read_config,
    read_tensors,
    write_files,
)
from moslora.tuner.config import MoSLoRAConfig

__all__ = ["PEFT_TYPE", "read", "write"]

PEFT_TYPE = "MOSLORA"
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
    found = group_factors(read_tensors(folder), PARTS, EMBEDDING_PARTS)
    strange = [key for key in found.rest if "moslora_" in key]
    if strange:
        raise AdapterError(f"{folder / WEIGHTS} holds tensors of an unknown form: {strange[:3]}.")
    without = [name for name, factors in found.modules.items() if "M" not in factors]
    if without:
        raise AdapterError(f"{folder / WEIGHTS}: {without[0]} lacks its mixer, moslora_M.")
    kept = {name: config[name] for name in (*SHARED, *OWN) if name in config}
    return build_adapter(folder, kept, found)


def write(adapter: Adapter, folder: Path) -> None:
    """Write a native adapter directory.

    Args:
        adapter: The adapter. A plain LoRA gets an identity mixer.
        folder: An existing, empty directory.

    Raises:
        OSError: If it cannot be written.
    """
    values: dict[str, Any] = dict(adapter.config)
    values.setdefault("mixer", "identity")
    if values.get("bias") == "lora_only":
        values["bias"] = "moslora_only"
    config = MoSLoRAConfig(inference_mode=True, **values)
    tensors = dict(adapter.extra)
    for name, factors in adapter.modules.items():
        tensors.update(name_tensors(name, factors, PARTS, EMBEDDING_PARTS))
    write_files(folder, config.to_dict(), tensors)
