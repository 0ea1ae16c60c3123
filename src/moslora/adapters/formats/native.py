"""The native format: what ``save_pretrained`` writes, mixers and all, to continue training.

``peft_type`` is ``MOSLORA`` and the tensors are ``moslora_A``, ``moslora_M``, ``moslora_B``, so that a
program without this package finds nothing it knows, rather than half.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moslora.adapters.factors import Adapter
from moslora.adapters.formats.building import build_adapter, settle
from moslora.adapters.formats.configuration import MOSLORA, SHARED, moslora_config, subtracts_start
from moslora.adapters.formats.directory import WEIGHTS, read_config, read_tensors, write_files
from moslora.adapters.formats.layout import group_factors, name_all
from moslora.adapters.formats.lora_fields import check_native_fields
from moslora.adapters.formats.tensors import load_tensors, read_whole_header
from moslora.core import functional
from moslora.core.mixers import CUSTOM, SINGULAR_VALUES
from moslora.errors import AdapterError

__all__ = ["PEFT_TYPE", "START", "as_native", "keep_start", "read", "read_start", "start_of", "write"]

PEFT_TYPE = "MOSLORA"
MAGNITUDE = "moslora_magnitude_vector"
OLD_MAGNITUDE = "moslora_magnitude"  # of moslora 0.1
PARTS = {"moslora_A": "A", "moslora_M": "M", "moslora_B": "B"}
EMBEDDING_PARTS = {"moslora_embedding_A": "A", "moslora_embedding_M": "M", "moslora_embedding_B": "B"}
# Where factors started that began from the base weight: to be subtracted.
STARTS = {"moslora_start_A": "start A", "moslora_start_M": "start M", "moslora_start_B": "start B"}
# What the mixers started as, beside the adapter that they became; a file of its own, which no loader looks for.
START = "moslora_start.safetensors"
OWN = ("mixer", "train_mixer", "mixer_pattern", "match_scale", "unlike_lora")


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
    check_native_fields(str(folder), config, MOSLORA)
    found = group_factors(
        read_tensors(folder),
        {**PARTS, **STARTS, MAGNITUDE: "magnitude", OLD_MAGNITUDE: "magnitude"},
        EMBEDDING_PARTS,
        config,
    )
    begun = {
        name: {letter: own.pop(letter) for letter in STARTS.values() if letter in own}
        for name, own in found.modules.items()
    }
    strange = [key for key in found.rest if "moslora_" in key]
    if strange:
        raise AdapterError(f"{folder / WEIGHTS} holds tensors of an unknown form: {strange[:3]}.")
    without = [name for name, factors in found.modules.items() if "M" not in factors]
    if without:
        raise AdapterError(f"{folder / WEIGHTS}: {without[0]} lacks its mixer, moslora_M.")
    kept = {name: config[name] for name in (*SHARED, *OWN) if name in config}
    if kept.get("mixer") == SINGULAR_VALUES:  # it was at the start
        kept["mixer"] = CUSTOM
    adapter = build_adapter(folder, kept, found)
    is_begun = subtracts_start(config.get("init_lora_weights"))
    whole = [name for name, own in begun.items() if len(own) == len(STARTS)]
    if len(whole) != (len(begun) if is_begun else 0) or any(len(own) % len(STARTS) for own in begun.values()):
        raise AdapterError(
            f"{folder}: its configuration says init_lora_weights={config.get('init_lora_weights')!r}, and "
            f"{len(whole)} of {len(begun)} modules have their start whole (moslora_start_A, _M, _B), which is to be "
            "subtracted. Save the adapter again."
        )
    return _subtract(folder, adapter, begun, config["init_lora_weights"]) if is_begun else adapter


def _subtract(
    folder: Path, adapter: Adapter, begun: Mapping[str, Mapping[str, torch.Tensor]], init: str
) -> Adapter:
    """Make factors of ``B·M·A - B0·M0·A0``, of twice the rank, in float32 at least."""
    modules = {}
    for name, factors in adapter.modules.items():
        start = [begun[name][letter] for letter in STARTS.values()]
        own = (factors.A.double(), factors.M.double(), factors.B.double())
        dtype = torch.promote_types(factors.A.dtype, torch.float32)
        A0, M0, B0 = (t.double() for t in start)
        try:
            whole = functional.subtract_start(own, (A0, M0, B0))
            A, M, B = (t.to(dtype) for t in whole)  # differences first, rounded once
            modules[name] = replace(factors, A=A, M=M, B=B)
        except ValueError as error:
            raise AdapterError(f"{folder}: {name}: its start does not fit its factors: {error}") from error
    # Of what it is now, M is nothing that has a name.
    config = {**adapter.config, "mixer": CUSTOM, "init_lora_weights": init}
    return replace(adapter, modules=modules, config=config)


def write(adapter: Adapter, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write a native adapter directory.

    Args:
        adapter: The adapter. A plain LoRA gets an identity mixer.
        folder: An existing, empty directory.
        dtype: Of the factors; None for their own.

    Raises:
        AdapterError: If a MoSLoRA adapter cannot have its configuration.
        OSError: If it cannot be written.
    """
    config = moslora_config(as_native(adapter))
    tensors = dict(adapter.extra)
    named = name_all(adapter.modules, PARTS, EMBEDDING_PARTS, f"{MAGNITUDE}.weight")
    tensors.update({key: tensor.to(dtype or tensor.dtype) for key, tensor in named.items()})
    write_files(folder, config, tensors)


def as_native(adapter: Adapter) -> dict[str, Any]:
    """Return the arguments of a native adapter's configuration.

    Args:
        adapter: The adapter. A plain LoRA gets an identity mixer.
    """
    values: dict[str, Any] = settle(adapter)
    values.setdefault("mixer", "identity")
    values.pop("init_lora_weights", None)  # the start is in the factors, as part of their rank
    if values.get("bias") == "lora_only":
        values["bias"] = "moslora_only"
    return values


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
    about = read_whole_header(path).metadata
    return read_start(path) if about.get("of") == _digest(folder) else None


def _digest(folder: Path) -> str:
    with (folder / WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
