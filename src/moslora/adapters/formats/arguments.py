"""What the arguments of an ``adapter_config.json`` may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moslora.adapters.formats.configuration import TASK_TYPES
from moslora.errors import AdapterError
from moslora.patterns import compile_fault

__all__ = ["ARGUMENTS", "check_config"]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e12


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**12


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_pattern(value: Any) -> bool:
    return isinstance(value, str) and compile_fault(value) is None


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(fits(item) for item in value)


def _dict_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, dict) and all(_is_pattern(key) and fits(item) for key, item in value.items())
    )


def _either(*ways: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: any(fits(value) for fits in ways)


_NAMES = (_either(_is_pattern, _list_of(_is_text)), "names in a list, or one regular expression")
_INDICES = (_either(_is_whole, _list_of(_is_whole)), "indices in a list")
# What an argument may be when it is there and not null, and how to say so.
ARGUMENTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "base_model_name_or_path": (_is_text, "a name"),
    "revision": (_is_text, "a name"),
    "task_type": (lambda value: value in TASK_TYPES, f"one of {', '.join(TASK_TYPES)}"),
    "auto_mapping": (lambda value: isinstance(value, dict), "an object"),
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "layers_to_transform": _INDICES,
    "layers_pattern": _NAMES,
    "modules_to_save": (_list_of(_is_text), "names in a list"),
    "target_parameters": (_list_of(_is_text), "names in a list"),
    "trainable_token_indices": (
        _either(
            _list_of(_is_whole), lambda v: isinstance(v, dict) and all(map(_list_of(_is_whole), v.values()))
        ),
        "indices in a list, or by the layer's name",
    ),
    "ensure_weight_tying": (_is_flag, "true or false"),
    "fan_in_fan_out": (_is_flag, "true or false"),
    "lora_dropout": (_is_number, "a number"),
    "bias": (_is_text, "a word"),
    "r": (_is_whole, "a whole number"),
    "lora_alpha": (_is_number, "a number"),
    "rank_pattern": (_dict_of(_is_whole), "whole numbers by regular expression"),
    "alpha_pattern": (_dict_of(_is_number), "numbers by regular expression"),
    "use_rslora": (_is_flag, "true or false"),
    "use_dora": (_is_flag, "true or false"),
    "lora_bias": (_is_flag, "true or false"),
    "mixer": (_is_text, "a name"),
    "unlike_lora": (
        lambda value: isinstance(value, dict) and all(map(_is_text, value.values())),
        "reasons by module",
    ),
}


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a configuration whose arguments are not what they can be.

    Args:
        path: Where it comes from, for messages.
        config: The arguments; unknown ones are not checked here.

    Raises:
        AdapterError: With the argument, what it is and what it can be.
    """
    for name, (fits, wanted) in ARGUMENTS.items():
        value = config.get(name)
        if value is not None and not fits(value):
            shown = repr(value) if len(repr(value)) < 60 else f"{repr(value)[:57]}..."
            raise AdapterError(
                f"{path}: {name} is {shown}; it must be {wanted}. Fix it, or save the adapter again."
            )
