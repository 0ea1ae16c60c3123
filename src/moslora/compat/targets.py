"""Which modules PEFT adapts for a configuration, and which it refuses to adapt with LoRA."""

from __future__ import annotations

from typing import Any

import peft.tuners.tuners_utils as tuners_utils
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

__all__ = ["expand_targets", "is_target"]


def is_target(config: Any, name: str) -> bool:
    """Return whether PEFT adapts a module.

    Calls ``peft.tuners.tuners_utils.check_target_module_exists``, seen in PEFT 0.18 to 0.21, which no documented
    module exports. It has the rules for suffixes, regular expressions, ``exclude_modules`` and
    ``layers_to_transform``. Without it the modules of a pipeline cannot be listed before its weights are loaded.
    It can go when PEFT exports the function, or lists the modules that a configuration matches.

    Args:
        config: An adapter's configuration. ``target_modules="all-linear"`` is not resolved.
        name: The module's dotted name in the base model.
    """
    return bool(check_target_module_exists(config, name))


def expand_targets(config: Any, model: nn.Module) -> None:
    """Put names in the place of ``target_modules="all-linear"``, as PEFT does when it adapts a model.

    Calls ``peft.tuners.tuners_utils._maybe_include_all_linear_layers``, seen in PEFT 0.18 to 0.21. Without it what the
    other settings fit could not be told before a model is adapted. It can go when PEFT lists the modules that a
    configuration matches.

    Args:
        config: An adapter's configuration, changed in place.
        model: The base model.
    """
    tuners_utils._maybe_include_all_linear_layers(config, model)
