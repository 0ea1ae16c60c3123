"""Finding what an installed library may not have, and who holds a function of it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

__all__ = ["find", "holders_of"]


def find(where: str) -> Any:
    """Return a module, or a class in one.

    Args:
        where: As ``"peft.utils.hotswap"`` or ``"transformers.integrations.peft:PeftAdapterMixin"``.

    Returns:
        It; None if what is installed does not have it (peft 0.18 to 0.21.2 and transformers 4.57 to 5.23 differ).
    """
    module_name, _, name = where.partition(":")
    try:
        module: Any = importlib.import_module(module_name)
    except ImportError:
        return None
    return getattr(module, name, None) if name else module


def holders_of(function: Any, name: str) -> Iterable[ModuleType]:
    """Return the modules that have imported a function by name, wherever they are.

    A change of a function that scripts import has to be made in all of them (PEFT 0.18 to 0.20).

    Args:
        function: The function.
        name: The name that they have it under.
    """
    return [
        module
        for module in list(sys.modules.values())
        if isinstance(module, ModuleType) and module.__dict__.get(name) is function
    ]
