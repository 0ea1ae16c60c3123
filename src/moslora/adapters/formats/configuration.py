"""What LoRA's and MoSLoRA's configurations are in ``adapter_config.json``: names and defaults as data, without PEFT.

``tests/test_at_rest.py`` holds both equal to what the installed PEFT and ``MoSLoRAConfig`` write.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moslora import versions
from moslora.core.mixers import CUSTOM, find_mixer
from moslora.errors import AdapterError

__all__ = [
    "BOTH",
    "LORA",
    "MOSLORA",
    "NO_MIXER",
    "SHARED",
    "TASK_TYPES",
    "Field",
    "lora_config",
    "moslora_config",
    "pattern_key",
    "selects",
    "subtracts_start",
]

# PEFT's TaskType.
TASK_TYPES = (
    "SEQ_CLS",
    "SEQ_2_SEQ_LM",
    "CAUSAL_LM",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)

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


@dataclass(frozen=True)
class Field:
    """An argument of a configuration, as JSON has it.

    Attributes:
        default: What is written where it is not set.
        since: The first version of PEFT that knows it; older ones warn of it when they read the file.
    """

    default: Any = None
    since: str = "0.18"


BOTH: dict[str, Field] = {
    "task_type": Field(),
    "auto_mapping": Field(),
    "base_model_name_or_path": Field(),
    "revision": Field(),
    "inference_mode": Field(True),
    "r": Field(8),
    "target_modules": Field(),
    "exclude_modules": Field(),
    "lora_alpha": Field(8),
    "lora_dropout": Field(0.0),
    "fan_in_fan_out": Field(False),
    "bias": Field("none"),
    "use_rslora": Field(False),
    "modules_to_save": Field(),
    "init_lora_weights": Field(True),
    "layers_to_transform": Field(),
    "layers_pattern": Field(),
    "rank_pattern": Field({}),
    "alpha_pattern": Field({}),
    "trainable_token_indices": Field(),
    "loftq_config": Field({}),
    "eva_config": Field(),
    "use_dora": Field(False),
    "lora_bias": Field(False),
    "target_parameters": Field(),
    "ensure_weight_tying": Field(False),
}

LORA: dict[str, Field] = BOTH | {
    "peft_type": Field("LORA"),
    "megatron_config": Field(),
    "megatron_core": Field("megatron.core"),
    "corda_config": Field(),
    "lora_ga_config": Field(since="0.19"),
    "velora_config": Field(since="0.20"),
    "alora_invocation_tokens": Field(),
    "use_qalora": Field(False),
    "qalora_group_size": Field(16),
    "monteclora_config": Field(since="0.20"),
    "layer_replication": Field(),
    "use_bdlora": Field(since="0.19"),
    "arrow_config": Field(),
    "kasa_config": Field(since="0.21"),
}

# What mixer_pattern says of a module without a mixer, whose M stays the identity.
NO_MIXER = "none"

MOSLORA: dict[str, Field] = BOTH | {
    "peft_type": Field("MOSLORA"),
    "mixer": Field("orthogonal"),
    "mixer_pattern": Field({}),
    "train_mixer": Field(),
    "match_scale": Field(False),
    "unlike_lora": Field({}),
    "values_in_file": Field(True),
}


def subtracts_start(init_lora_weights: Any) -> bool:
    """Return whether an adapter starts from the base weight, so that its start is subtracted from it.

    Args:
        init_lora_weights: The argument of its configuration.
    """
    return isinstance(init_lora_weights, str) and init_lora_weights.startswith(("pissa", "olora"))


def pattern_key(patterns: Iterable[str], module: str) -> str:
    """Return the key of ``rank_pattern`` or ``alpha_pattern`` that PEFT looks a module up with.

    Args:
        patterns: The keys.
        module: Path in the base model.

    Returns:
        The first key that fits the module; its path if none does.
    """
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), module)


def selects(config: Mapping[str, Any], module: str) -> bool:
    """Tell whether a configuration chooses a module, so that PEFT gives it factors when it loads the adapter.

    Args:
        config: Of the adapter, with ``target_modules`` in a list or as a regular expression.
        module: Path in the base model.
    """
    excluded = config.get("exclude_modules")
    if excluded and _names(excluded, module):
        return False
    if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in config.get("modules_to_save") or ()):
        return False
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    if not targets or not _names(targets, module):
        return False
    if layers is None or layers == [] or isinstance(targets, str) or module in targets:
        return True
    patterns = config.get("layers_pattern") or r"[^.]*"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        before = r".*?\." if not config.get("layers_pattern") else r"(?:^|.*?\.)"
        found = re.match(rf"{before}{pattern}\.(?P<index>\d+)\.", module)
        if found:
            return int(found["index"]) in ([layers] if isinstance(layers, int) else layers)
    return False


def _names(names: str | Iterable[str], module: str) -> bool:
    """Tell whether a regular expression is a module's path, or one of several names its end."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def lora_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON object that PEFT writes for a plain LoRA that is not trained further.

    Args:
        values: Arguments that are set, all of ``SHARED``.

    Returns:
        Every argument that the installed PEFT knows. (PEFT's own reader checks the values, when the file is proven.)
    """
    return _filled(LORA, values)


def moslora_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON object that ``MoSLoRAConfig(inference_mode=True, **values)`` writes.

    Args:
        values: Arguments that are set.

    Returns:
        Every argument.

    Raises:
        AdapterError: If an argument is unknown, or has a value that a MoSLoRA adapter cannot have.
    """
    unknown = sorted(values.keys() - MOSLORA.keys())
    if unknown:
        raise AdapterError(f"The adapter's configuration has no native form: {unknown[0]} is unknown there.")
    config = _filled(MOSLORA, values)
    config.update({name: config[name] or {} for name in ("rank_pattern", "alpha_pattern", "mixer_pattern")})
    fault = _fault(config)
    if fault:
        raise AdapterError(f"The adapter's configuration has no native form: {fault}")
    if config["train_mixer"] is None:
        config["train_mixer"] = config["mixer"] == CUSTOM or find_mixer(config["mixer"]).learned
    return config


def _filled(fields: Mapping[str, Field], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values and, where there are none, defaults."""
    known = {name: field for name, field in fields.items() if versions.is_at_least("peft", field.since)}
    config = {name: copy.deepcopy(values.get(name, field.default)) for name, field in known.items()}
    for name in ("target_modules", "exclude_modules"):
        if isinstance(config[name], list | set):
            config[name] = sorted(set(config[name]))
    return config | {"peft_version": versions.installed("peft")}


def _fault(config: Mapping[str, Any]) -> str:
    """Return what ``MoSLoRAConfig`` would refuse; empty if nothing."""
    try:
        if config["mixer"] != CUSTOM:
            find_mixer(config["mixer"])
        for name in config["mixer_pattern"].values():
            if name != NO_MIXER:
                find_mixer(name)
    except (TypeError, ValueError) as error:
        return str(error)
    ranks = {"r": config["r"]}
    ranks |= {f"rank_pattern[{key!r}]": rank for key, rank in config["rank_pattern"].items()}
    for place, rank in ranks.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            return f"{place}={rank!r} is not a rank; it must be an integer of at least 1."
        if config["mixer"] == "two-subspace" and rank % 2:
            return f'{place}={rank} is odd, but mixer="two-subspace" mixes two halves.'
    names, layers, dropout = config["target_modules"], config["layers_to_transform"], config["lora_dropout"]
    faults = {
        f"task_type={config['task_type']!r} must be one of {', '.join(TASK_TYPES)}.": (
            config["task_type"] is not None and config["task_type"] not in TASK_TYPES
        ),
        f"lora_dropout={dropout!r} must lie in [0, 1).": (
            not isinstance(dropout, int | float) or not 0 <= dropout < 1
        ),
        f"bias={config['bias']!r} is unknown; choose one of 'none', 'all', 'moslora_only'.": (
            config["bias"] not in ("none", "all", "moslora_only")
        ),
        "lora_bias=True cannot be used with use_dora=True.": config["lora_bias"] and config["use_dora"],
        f"target_parameters={config['target_parameters']!r} must be a list of names or suffixes.": (
            isinstance(config["target_parameters"], str)
        ),
        "layers_to_transform and layers_pattern cannot be used when target_modules is a string.": (
            isinstance(names, str) and (layers is not None or config["layers_pattern"] is not None)
        ),
        "layers_pattern needs layers_to_transform.": config["layers_pattern"] and layers is None,
    }
    return next((text for text, is_fault in faults.items() if is_fault), "")
