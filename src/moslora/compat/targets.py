"""Which modules PEFT adapts for a configuration."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists

__all__ = ["is_target"]


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
