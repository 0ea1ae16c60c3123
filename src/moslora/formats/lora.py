"""Plain LoRA, as every PEFT reads it: the mixer folded into A, the scale moved into B.

Alpha is written equal to the rank, so the reader's scale is 1. It is the only form that readers agree on:
some take alpha for r, some know neither rsLoRA nor per-module alphas.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

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

__all__ = ["PEFT_TYPE", "read", "write"]

PEFT_TYPE = "LORA"
PARTS = {"lora_A": "A", "lora_B": "B"}
EMBEDDING_PARTS = {"lora_embedding_A": "A", "lora_embedding_B": "B"}

# Tensors of LoRA variants whose ΔW is not s·B·A: reading them as plain LoRA would be silently wrong.
FOREIGN = {
    "lora_AB": "a mixer in the naming of MoSLoRA's authors; stock PEFT drops it and runs B·A, which is wrong",
    "lora_mixer": "a mixer in the naming of PEFT pull request 2294; stock PEFT drops it and runs B·A",
    "lora_magnitude_vector": "DoRA's magnitude",
    "lora_B.bias": "a bias on B",
}
VARIANTS = ("use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config")


def read(folder: Path) -> Adapter:
    """Read a plain LoRA directory; its mixers are the identity.

    Args:
        folder: The directory.

    Returns:
        The adapter, in the dtype of the file.

    Raises:
        AdapterError: If it is not a whole, finite, plain LoRA adapter.
    """
    config = read_config(folder)
    if config["peft_type"] != PEFT_TYPE:
        raise AdapterError(f"{folder} is of type {config['peft_type']}, not {PEFT_TYPE}.")
    set_variants = [name for name in VARIANTS if config.get(name)]
    if set_variants:
        raise AdapterError(f"{folder} is no plain LoRA: {set_variants[0]} is set. Only plain LoRA is read.")
    found = group_factors(read_tensors(folder), PARTS, EMBEDDING_PARTS)
    for key in found.rest:
        for mark, meaning in FOREIGN.items():
            if mark in key:
                raise AdapterError(f"{folder / WEIGHTS} is no plain LoRA: {key} is {meaning}.")
    kept = {name: config[name] for name in SHARED if name in config}
    return build_adapter(folder, kept, found)


def write(adapter: Adapter, folder: Path) -> None:
    """Write a plain LoRA directory; mixers that are not folded yet are folded here.

    Args:
        adapter: The adapter.
        folder: An existing, empty directory.

    Raises:
        AdapterError: If PEFT's LoRA would compute another output from the same factors.
        OSError: If it cannot be written.
    """
    for name, reason in (adapter.config.get("unlike_lora") or {}).items():
        raise AdapterError(
            f"{name} cannot be written as a plain LoRA: {reason}. Merge the adapter into its base instead, with "
            "merge_and_unload()."
        )
    values: dict[str, Any] = copy.deepcopy(
        {name: adapter.config[name] for name in SHARED if name in adapter.config}
    )
    values["lora_alpha"] = values["r"]
    values["alpha_pattern"] = dict(values.get("rank_pattern") or {})
    values["use_rslora"] = False
    if values.get("bias") == "moslora_only":
        values["bias"] = "lora_only"
    config = LoraConfig(inference_mode=True, **values)
    tensors = dict(adapter.extra)
    for name, factors in adapter.modules.items():
        # float32 at least: rounding a product to half precision again would cost more than it saves.
        plain = factors.at_least(torch.float32).fold().unscaled()
        tensors.update(name_tensors(name, plain, PARTS, EMBEDDING_PARTS))
    write_files(folder, config.to_dict(), tensors)
