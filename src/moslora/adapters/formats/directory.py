"""A PEFT adapter directory: ``adapter_config.json`` beside ``adapter_model.safetensors``.

Both of PEFT's formats, native and lora, lie on disk like this. What is written appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moslora.adapters.formats.arguments import check_config
from moslora.adapters.formats.tensors import load_tensors, save_tensors
from moslora.errors import AdapterError

__all__ = ["CONFIG", "WEIGHTS", "read_config", "read_tensors", "staged", "write_files"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

# What LoRA's and MoSLoRA's configurations have in common, and an adapter carries from one to the other.
SHARED = (
    "base_model_name_or_path",
    "revision",
    "task_type",
    "auto_mapping",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "ensure_weight_tying",
    "fan_in_fan_out",
    "lora_dropout",
    "bias",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "lora_bias",
)


def _near(path: Path) -> str:
    """Suggest the sibling whose name is nearest."""
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    return f" Did you mean {path.parent / near[0]}?" if near else ""


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
        raise AdapterError(f"{folder} is a file; give the adapter's directory, which holds {CONFIG}.")
    path = folder / CONFIG
    if not path.is_file():
        inside = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
        nested = [p.parent for p in sorted(folder.glob(f"*/{CONFIG}"))]
        hint = f" Did you mean {nested[0]}?" if nested else ""
        raise AdapterError(f"{folder} is no adapter directory: it has no {CONFIG} (found: {inside}).{hint}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
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
    if not path.is_file():
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
        folder: An existing directory, as ``staged`` gives it.
        config: JSON object; sets are written as sorted lists.
        tensors: Tensors by name.

    Raises:
        OSError: If the disk is full or the folder not writable.
    """
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    (folder / CONFIG).write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_tensors(folder / WEIGHTS, tensors, {"format": "pt"})


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Write a directory beside its place and move it there when everything inside the block went well.

    Args:
        out: Where it shall appear; must not exist, or be an empty directory.

    Yields:
        A temporary directory beside ``out``. If the block raises, it is removed and ``out`` stays as it was.

    Raises:
        FileExistsError: If something lies at ``out`` already.
    """
    out = Path(out)
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise FileExistsError(f"{out} exists already. Name a new directory, or remove that one first.")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        temporary.replace(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def staged_file(out: Path) -> Iterator[Path]:
    """Write a file beside its place and move it there when everything inside the block went well.

    Args:
        out: Where it shall appear; must not exist.

    Yields:
        A path in a temporary directory beside ``out``. If the block raises, nothing is left of it.

    Raises:
        FileExistsError: If something lies at ``out`` already.
    """
    out = Path(out)
    if out.is_symlink() or out.exists():
        raise FileExistsError(f"{out} exists already. Name a new file, or remove that one first.")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield temporary / out.name
        (temporary / out.name).replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    """Read the process's umask, which only setting it reveals."""
    value = os.umask(0)
    os.umask(value)
    return value
