"""What differs between transformers 4.57 and 5.23: names of a model's parts, and what ``load_adapter`` returns."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from moslora import versions
from moslora.compat.lookup import find

__all__ = ["HAS_CONVERSION", "convert_targets", "empty_loading_report", "weight_renaming"]

# PEFT has it since 0.19, and it needs transformers 5. Lost elsewhere: the old names of experts in target_modules (there
# are no new ones in transformers 4), and adapters of 0.1 with a magnitude in transformers' load_adapter.
HAS_CONVERSION = versions.is_at_least("peft", "0.19") and versions.is_at_least("transformers", "5")
CONVERSION = "peft.utils.transformers_weight_conversion"


def convert_targets(config: Any, model: nn.Module, model_type: Any) -> None:
    """Name targets as the installed transformers does, where it holds experts as parameters that were modules.

    Transformers 5.0 to 5.23 does so; PEFT 0.19 to 0.21.2 rewrites the names for its LoRA alone, by a private function.
    Without this, the names that older scripts use (Mixtral's ``w1``) are not found. It can go when PEFT converts the
    targets of every tuner.

    Args:
        config: An adapter's configuration, changed in place.
        model: The base model.
        model_type: As its configuration has it.
    """
    mappings, conversion = find("transformers.conversion_mapping"), find(CONVERSION)
    if mappings is None or mappings.get_checkpoint_conversion_mapping(model_type) is None:
        return
    if conversion is None:
        return  # PEFT says which target is not found
    convert = conversion._convert_peft_config_moe
    is_by_type = "model_type" in convert.__code__.co_varnames[: convert.__code__.co_argcount]  # 0.19
    convert(config, model_type if is_by_type else model)


def weight_renaming(old: str, new: str) -> Any:
    """Make a rule that renames a tensor of a file as ``load_adapter`` of transformers 5.0 to 5.23 reads it.

    Args:
        old: A regular expression of its name in the file.
        new: Its name in the model.
    """
    return find(CONVERSION).WeightRenaming(old, new)


def empty_loading_report() -> Any:
    """Return what ``load_adapter`` of transformers 5.0 to 5.23 returns where nothing is missing; None for 4.57.

    The report's class is private. Without this, a caller that reads the report fails after hot-swapping.
    """
    report = find("transformers.utils.loading_report")
    if report is None:
        return None
    kinds: dict[str, Any] = {"error_msgs": list, "conversion_errors": dict}
    fields = dataclasses.fields(report.LoadStateDictInfo)
    return report.LoadStateDictInfo(**{field.name: kinds.get(field.name, set)() for field in fields})
