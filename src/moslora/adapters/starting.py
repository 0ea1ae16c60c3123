"""An adapter that training starts from: its configuration, as arguments of a fresh adapter of the same structure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moslora.adapters.export import named_for_base
from moslora.adapters.formats.configuration import MOSLORA, moslora_config, subtracts_start
from moslora.adapters.formats.directory import read_config
from moslora.adapters.formats.native import as_native
from moslora.adapters.formats.reading import detect, read_adapter
from moslora.core.mixers import CUSTOM, SINGULAR_VALUES
from moslora.errors import AdapterError

__all__ = ["fill_from_start", "start_arguments"]

# What PEFT notes, or saving fills in; and what is a matter of training.
NOTED = (
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "values_in_file", "unlike_lora", "match_scale", "eva_config", "loftq_config"),
)
ALWAYS = ("r", "lora_alpha", "target_modules", "mixer", "train_mixer")
FREE = ("lora_dropout", "train_mixer")
# Of a vision task its scopes choose modules and ranks.
CHOSEN_BY_SCOPES = (
    *("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "mixer_pattern"),
    *("layers_to_transform", "layers_pattern", "r", "lora_alpha", "modules_to_save"),
)


def start_arguments(path: Path, base: str | None) -> dict[str, Any]:
    """Return the arguments of ``MoSLoRAConfig`` that give a fresh adapter an existing one's structure.

    Args:
        path: An adapter of any format that is read; a plain LoRA gets an identity mixer.
        base: The base that it was trained on, for starts that are computed from it.

    Returns:
        Arguments that are set. Values are the file's business, so ``mixer`` and ``init_lora_weights`` say no more than
        what the structure depends on.

    Raises:
        AdapterError: If it cannot be read, or is one of a pipeline.
    """
    if detect(path) == "native":
        config = read_config(path) if (path / "adapter_config.json").is_file() else None
    else:
        adapter = named_for_base(read_adapter(path, base=base), "native", base)[0]
        config = None if "components" in adapter.config else moslora_config(as_native(adapter))
    if config is None:
        raise AdapterError(
            f"{path} is an adapter of a pipeline, in several parts, and cannot be started from."
        )
    arguments = {name: value for name, value in config.items() if name not in NOTED and value is not None}
    init = arguments.get("init_lora_weights", True)
    if not subtracts_start(init):
        arguments["init_lora_weights"] = True
    if arguments.get("mixer") in (CUSTOM, SINGULAR_VALUES):
        arguments["mixer"] = "kaiming" if subtracts_start(init) else "identity"
    return {
        name: value
        for name, value in arguments.items()
        if name in ALWAYS or (name in MOSLORA and value not in ({}, []) and value != MOSLORA[name].default)
    }


def fill_from_start(
    adapter: Mapping[str, Any], start: Mapping[str, Any], where: str, by_scopes: bool
) -> tuple[dict[str, Any], list[str]]:
    """Put a start's structure under what a recipe says of the adapter.

    Args:
        adapter: What the recipe says.
        start: From ``start_arguments``.
        where: The start, for messages.
        by_scopes: Whether the task's scopes choose modules and ranks.

    Returns:
        The adapter section, and where the two contradict each other, a line each.
    """
    problems = []
    own = {name: value for name, value in start.items() if not (by_scopes and name in CHOSEN_BY_SCOPES)}
    for name, value in adapter.items():
        if name in FREE or (by_scopes and name in CHOSEN_BY_SCOPES):
            continue
        wanted = own.get(name, _absent(name))
        if _plain(value) != _plain(wanted):
            problems.append(
                f"adapter.{name} is {_shown(value)}, and the adapter that it starts from ({where}) has "
                f"{_shown(wanted)}. Leave it out: structure and mixers are the start's."
            )
    return {**own, **adapter}, problems


def _absent(name: str) -> Any:
    defaults = {
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": False,
        "bias": "none",
        "fan_in_fan_out": False,
    }
    return defaults.get(name)


def _plain(value: Any) -> Any:
    """Return a value as it compares: lists of names without order, what is empty as nothing."""
    if isinstance(value, list | set | tuple):
        value = sorted(map(str, value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return None if value in ({}, [], False, None) else value


def _shown(value: Any) -> str:
    text = repr(sorted(value) if isinstance(value, set) else value)
    return "nothing of it" if value is None else text if len(text) <= 80 else f"{text[:77]}…"
