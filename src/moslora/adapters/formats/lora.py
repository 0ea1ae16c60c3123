"""Plain LoRA, as every PEFT reads it: the mixer folded into A, the scale moved into B.

Alpha is written equal to the rank, so the reader's scale is 1. It is the only form that readers agree on:
some take alpha for r, some know neither rsLoRA nor per-module alphas.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from moslora.adapters.factors import Adapter
from moslora.adapters.formats import skeleton
from moslora.adapters.formats.base_start import subtract_base_start
from moslora.adapters.formats.building import build_adapter, settle
from moslora.adapters.formats.configuration import SHARED, lora_config, selects
from moslora.adapters.formats.directory import WEIGHTS, read_config, read_tensors, write_files
from moslora.adapters.formats.key_names import without_wrappers
from moslora.adapters.formats.layout import KEY_PREFIX, Found, group_factors, name_all
from moslora.adapters.formats.lora_fields import TRAINING_ONLY, check_fields
from moslora.errors import AdapterError
from moslora.wording import first_line

__all__ = ["PEFT_TYPE", "flatten", "read", "read_with_peft", "write"]

PEFT_TYPE = "LORA"
MAGNITUDE = "lora_magnitude_vector"  # without .weight, as PEFT's files have it
PARTS = {"lora_A": "A", "lora_B": "B"}
EMBEDDING_PARTS = {"lora_embedding_A": "A", "lora_embedding_B": "B"}

# Tensors of LoRA variants whose ΔW is not s·B·A: reading them as plain LoRA would be silently wrong.
FOREIGN = {
    "lora_AB": "a mixer in the naming of MoSLoRA's authors; stock PEFT drops it and runs B·A, which is wrong",
    "lora_mixer": "a mixer in the naming of PEFT pull request 2294; stock PEFT drops it and runs B·A",
    "lora_A.bias": "a bias on A",
}


def read(folder: Path, base: str | None = None, say: Callable[[str], None] = lambda _: None) -> Adapter:
    """Read a plain LoRA directory, DoRA included; its mixers are the identity.

    Args:
        folder: The directory.
        base: The base that it was trained on, for a start that PEFT took out of it; None for the one that the adapter
            names, where that is a folder.
        say: Receives a line before long work.

    Returns:
        The adapter, in the dtype of the file.

    Raises:
        AdapterError: If it is not a whole, finite, plain LoRA adapter, or its start cannot be computed.
        ModelError, ProofError: If its start cannot be computed from the base.
    """
    config = read_config(folder)
    if config["peft_type"] != PEFT_TYPE:
        raise AdapterError(f"{folder} is of type {config['peft_type']}, not {PEFT_TYPE}.")
    start = check_fields(str(folder), config, also=("lora_use_mixer_pattern",))
    found = group_factors(read_tensors(folder), PARTS, EMBEDDING_PARTS, config)
    for key in [key for key in found.rest if key.endswith(f".{MAGNITUDE}")]:
        module = key.removesuffix(f".{MAGNITUDE}").removeprefix(KEY_PREFIX)
        found.modules.setdefault(module, {})["magnitude"] = found.rest.pop(key)
    for key in [key for key in found.rest if any(f"{mark}." in f"{key}." for mark in TRAINING_ONLY)]:
        del found.rest[key]
    for key in found.rest:
        for mark, meaning in FOREIGN.items():
            if mark in key:
                raise AdapterError(f"{folder / WEIGHTS} is not a plain LoRA: {key} is {meaning}.")
    kept = {name: config[name] for name in SHARED if name in config}
    _check_chosen(folder, config, found)
    adapter = build_adapter(folder, kept, found)
    return subtract_base_start(adapter, start, folder, base, say) if start else adapter


def _check_chosen(folder: Path, config: Mapping[str, Any], found: Found) -> None:
    """Refuse factors that PEFT passes over, since the configuration does not choose their modules."""
    targets = config.get("target_modules")
    if not targets or targets == "all-linear" or config.get("ensure_weight_tying"):
        return  # PEFT chooses by the model, or ties a head's factors to the embedding's
    parents = {str(name).rpartition(".")[0] for name in config.get("target_parameters") or ()}
    paths = {name: name.partition(".base_layer")[0] for name in found.modules}
    outer, config = (
        found.stripped,
        without_wrappers(config),
    )  # names that were put right may stand in it as they were
    passed_over = [
        name
        for name, path in paths.items()
        if not selects(config, path)
        and not (outer and selects(config, f"{outer}{path}"))
        and not any(path == parent or path.endswith(f".{parent}") for parent in parents)
    ]
    if passed_over:
        raise AdapterError(
            f"{folder}: PEFT passes over {len(passed_over)} of {len(paths)} modules, as {passed_over[0]}: the "
            "configuration does "
            "not choose them (target_modules, exclude_modules, layers_to_transform, layers_pattern, "
            "modules_to_save). If they "
            "belong to the adapter, name them in target_modules of its adapter_config.json, and nothing else "
            "there that leaves "
            "them out; if not, remove their tensors."
        )


def flatten(adapter: Adapter) -> Adapter:
    """Fold every mixer and move every scale into B, in float32 at least.

    Args:
        adapter: The adapter.

    Returns:
        A plain LoRA of the same ΔW, with alpha = r everywhere.

    Raises:
        AdapterError: If PEFT's LoRA would compute another output from the same factors.
    """
    for name, reason in (adapter.config.get("unlike_lora") or {}).items():
        raise AdapterError(
            f"{name} cannot be written as a plain LoRA: {reason}. Merge the adapter into its base instead: "
            "load it with PEFT (import moslora first), call merge_and_unload(), and save the model."
        )
    # float32 at least: rounding a product to half precision again would cost more than it saves.
    modules = {name: f.at_least(torch.float32).fold().unscaled() for name, f in adapter.modules.items()}
    config = dict(adapter.config)
    if "r" in config:
        config.update(lora_alpha=config["r"], use_rslora=False)
        config["alpha_pattern"] = dict(config.get("rank_pattern") or {})
    return Adapter(modules, config, adapter.extra)


def write(adapter: Adapter, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write a plain LoRA directory; mixers that are not folded yet are folded here.

    Args:
        adapter: The adapter.
        folder: An existing, empty directory.
        dtype: Of the factors; None for float32, or what is wider.

    Raises:
        AdapterError: If PEFT's LoRA would compute another output from the same factors.
        OSError: If it cannot be written.
    """
    plain = flatten(adapter)
    values: dict[str, Any] = {name: value for name, value in settle(plain).items() if name in SHARED}
    if values.get("bias") == "moslora_only":
        values["bias"] = "lora_only"
    tensors = dict(plain.extra)
    named = name_all(plain.modules, PARTS, EMBEDDING_PARTS, MAGNITUDE)
    tensors.update({key: tensor.to(dtype or tensor.dtype) for key, tensor in named.items()})
    write_files(folder, lora_config(values), tensors)


def read_with_peft(folder: Path, like: Adapter) -> tuple[Adapter, str]:
    """Read a plain LoRA directory as stock PEFT does: its choice of modules, its ranks and its scales.

    Args:
        folder: The directory.
        like: What was written.

    Returns:
        What PEFT would run; and the name of the reader.

    Raises:
        AdapterError: If PEFT could not load it, or passed over a tensor.
    """
    from peft import LoraConfig
    from peft.utils.save_and_load import load_peft_weights

    config = LoraConfig.from_pretrained(folder)
    own = {key: t for key, t in load_peft_weights(folder, device="cpu").items() if key not in like.extra}
    try:
        found = skeleton.load_with_peft(
            config, {key.removeprefix(KEY_PREFIX): tensor for key, tensor in own.items()}, like
        )
    except AdapterError:
        raise
    except Exception as error:  # whatever PEFT raises for a configuration that it cannot follow
        raise AdapterError(
            f"Stock PEFT could not load what was written: {first_line(error)} Check the arguments in the source's "
            "adapter_config.json."
        ) from error
    return found, f"peft {importlib.metadata.version('peft')}"
