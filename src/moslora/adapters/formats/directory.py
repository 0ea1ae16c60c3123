"""A PEFT adapter directory: ``adapter_config.json`` beside ``adapter_model.safetensors``.

Both of PEFT's formats, native and lora, are stored like this.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moslora.adapters.formats.arguments import check_config
from moslora.adapters.formats.tensors import load_tensors, save_tensors
from moslora.bounded import kind_of_file, read_json
from moslora.errors import AdapterError
from moslora.wording import nearest

__all__ = ["CONFIG", "WEIGHTS", "read_config", "read_tensors", "write_files"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def _near(path: Path) -> str:
    """Suggest the sibling whose name is nearest."""
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = nearest(path.name, siblings)
    return f" Did you mean {path.parent / near}?" if near else ""


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``adapter_config.json``.

    Args:
        folder: The adapter directory.

    Returns:
        Its JSON object.

    Raises:
        AdapterError: If it is not there, or no JSON object with a ``peft_type``.
    """
    if not folder.exists():
        raise AdapterError(f"{folder} does not exist.{_near(folder)}")
    if not folder.is_dir():
        raise AdapterError(
            f"{folder} is {kind_of_file(folder) or 'a file'}; give the adapter's directory, which holds {CONFIG}."
        )
    path = folder / CONFIG
    if not path.is_file():
        inside = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
        nested = [p.parent for p in sorted(folder.glob(f"*/{CONFIG}"))]
        hint = f" Did you mean {nested[0]}?" if nested else ""
        raise AdapterError(
            f"{folder} is not an adapter directory: it has no {CONFIG} (found: {inside}).{hint}"
        )
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{path} cannot be read: {error}. Take it from a backup, or save the adapter again."
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise AdapterError(f"{path} has no peft_type, so it does not say which method it belongs to.")
    check_config(path, config)
    return config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read ``adapter_model.safetensors``.

    Args:
        folder: The adapter directory.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        AdapterError: If the file is missing, damaged, or holds empty or non-finite tensors. Pickled
            weights (``.bin``) are not opened.
    """
    path = folder / WEIGHTS
    if kind_of_file(path):
        if (folder / "adapter_model.bin").exists():
            raise AdapterError(
                f"{folder} holds its weights as a pickle (adapter_model.bin), which can run code when "
                "opened. Load the adapter in PEFT and save it again; PEFT writes safetensors."
            )
        raise AdapterError(f"{folder} has no {WEIGHTS}.")
    return load_tensors(path)


def write_files(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files of an adapter directory.

    Args:
        folder: An existing directory, as ``files.new_directory`` gives it.
        config: JSON object; sets are written as sorted lists.
        tensors: Tensors by name.

    Raises:
        OSError: If the disk is full or the folder not writable.
    """
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    (folder / CONFIG).write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
