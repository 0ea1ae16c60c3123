"""Other names for the modules of an adapter, its tensors beside the factors, and what its configuration targets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moslora.adapters.factors import Adapter
from moslora.adapters.formats.building import name_exactly
from moslora.adapters.formats.configuration import selects
from moslora.adapters.formats.key_names import KEY_PREFIX
from moslora.models.module_names import ModuleNames

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["WITHIN", "named_alike", "rename_modules", "renamed_extra", "targets_module"]

# Behind a tensor's path in a file, where PEFT wraps the module that has it.
WITHIN = re.compile(r"\.(?:base_layer|original_module|modules_to_save|token_adapter)(?=\.)")


def named_alike(key: str, old: str, new: str) -> str:
    """Give a tensor's key another path, keeping what PEFT put between.

    Args:
        key: Of the tensor, in a file.
        old: Its name, without what PEFT put there.
        new: What it shall be called.
    """
    if old == new:
        return key
    within = "".join(WITHIN.findall(key))
    owner, _, last = new.rpartition(".")
    return f"{KEY_PREFIX}{owner}{within}.{last}"


def renamed_extra(extra: Mapping[str, Tensor], names: ModuleNames) -> dict[str, Tensor]:
    """Give the tensors beside the factors the names that they have on disk.

    Args:
        extra: By key, with the base's names in memory.
        names: The base's.

    Returns:
        They by the names in the base's files, where it has one tensor for each.
    """
    found = {}
    for key, tensor in extra.items():
        name = WITHIN.sub("", key.removeprefix(KEY_PREFIX))
        place = names.tensors.get(name)
        own = place.stored[0] if place is not None and len(place.stored) == 1 else name
        found[named_alike(key, name, own)] = tensor
    return found


def rename_modules(adapter: Adapter, paths: Mapping[str, str]) -> Adapter:
    """Give modules other paths, and the configuration names that find them.

    Args:
        adapter: The adapter.
        paths: New path by old, of every module.

    Returns:
        The adapter, its ``target_modules`` made exact where they would not find the new paths.
    """
    config = dict(adapter.config)
    modules = {paths[path]: factors for path, factors in adapter.modules.items()}
    plain = [path for path, factors in modules.items() if factors.form.kind != "expert"]
    if not all(targets_module(config, path) for path in plain):
        config["target_modules"] = name_exactly(plain)
        config["exclude_modules"] = config["layers_to_transform"] = config["layers_pattern"] = None
    if config.get("unlike_lora"):
        config["unlike_lora"] = {paths.get(path, path): why for path, why in config["unlike_lora"].items()}
    return replace(adapter, modules=modules, config=config)


def targets_module(config: Mapping[str, Any], path: str) -> bool:
    """Tell whether a configuration's ``target_modules`` name a module, as PEFT decides.

    Args:
        config: The adapter's configuration.
        path: Path in the base.

    Returns:
        Also True for ``"all-linear"``, which PEFT resolves by the modules' classes.
    """
    if config.get("target_modules") == "all-linear":
        config = {**config, "target_modules": [path]}
    return selects(config, path)
