"""What transformers makes of the names in a checkpoint: those of a model in memory, by its own conversion.

This file imports nothing at import time, so that every floor may use it.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["names_in_memory"]


def names_in_memory(model: Any, keys: Iterable[str]) -> dict[str, tuple[tuple[str, ...], bool]]:
    """Return which tensors of a model a checkpoint's tensors become.

    - Private: ``transformers.conversion_mapping.get_model_conversion_mapping`` and
      ``transformers.core_model_loading.rename_source_key`` and ``WeightRenaming``, seen in 5.23; in 4.57 the class
      attribute ``_checkpoint_conversion_mapping``, a table of regular expressions.
    - Without it: names moved between versions and are others on disk than in memory (``model.layers…`` and
      ``model.language_model.layers…`` of Qwen2-VL), so an adapter could not be held against a base on disk.
    - Can go: when transformers has a public function from names on disk to names in memory.

    Args:
        model: A model, of the meta device or not.
        keys: Names of tensors as files have them, of this version or an older one.

    Returns:
        By key, the names in memory, and whether values change on the way (several tensors put together, one taken
        apart, entries in another order). Keys that the model has no place for are left out.
    """
    names: dict[str, Any] = dict(model.state_dict())
    prefix = str(getattr(model, "base_model_prefix", "") or "")
    try:
        mapping: Any = importlib.import_module("transformers.conversion_mapping")
        loading: Any = importlib.import_module("transformers.core_model_loading")
        transforms = mapping.get_model_conversion_mapping(model)
    except (ImportError, AttributeError):  # transformers 4
        rules = getattr(model, "_checkpoint_conversion_mapping", None) or {}
        found = {key: _prefixed(_renamed(key, rules), prefix, names) for key in keys}
        return {key: ((name,), False) for key, name in found.items() if name in names}
    renamings = [rule for rule in transforms if isinstance(rule, loading.WeightRenaming)]
    converters = [rule for rule in transforms if not isinstance(rule, loading.WeightRenaming)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    result = {}
    for key in sorted(keys):  # in order: a rule may wait for another's first key
        name, pattern = loading.rename_source_key(key, renamings, converters, prefix, names)
        if name not in names and key in names:
            name, pattern = key, None
        elif name not in names and pattern is None:
            name = _prefixed(key, prefix, names)
        if name not in names:
            continue
        targets = [name]
        if pattern is not None:
            first, *others = by_pattern[pattern].target_patterns
            targets += [name.replace(first, other) for other in others]
        result[key] = (tuple(target for target in targets if target in names), pattern is not None)
    return result


def _renamed(key: str, rules: Mapping[str, str]) -> str:
    """Apply the first rule of transformers 4 that fits."""
    for pattern, replacement in rules.items():
        name, count = re.subn(pattern, replacement, key)
        if count:
            return name
    return key


def _prefixed(key: str, prefix: str, names: Mapping[str, Any]) -> str:
    """Add or remove the prefix of the model without its head, where that makes it one of the names."""
    if key in names or not prefix:
        return key
    short = key.removeprefix(f"{prefix}.")
    return next((name for name in (short, f"{prefix}.{key}") if name in names), key)
