"""Parameters that accelerate offloads and DeepSpeed partitions, and bringing them in for a while.

accelerate marks a module that it hooks by ``_hf_hook`` (seen in 1.15; 1.12 is the oldest allowed), DeepSpeed's ZeRO-3 a
parameter by ``ds_id`` and ``ds_shape`` (no version is pinned: the tests that need DeepSpeed run where it is installed).
This file imports both inside functions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["execution_device", "is_brought_in", "loaded", "whole_shape"]


def execution_device(*modules: nn.Module) -> torch.device | None:
    """Return where accelerate (1.15) runs modules whose parameters it offloads; None if it runs none of them.

    An offloaded parameter is on the meta device, so it does not tell. Without this, what is computed beside an
    offloaded module would be on another device than its output.

    Args:
        *modules: The first that has a hook counts.
    """
    for module in modules:
        hook = getattr(module, "_hf_hook", None)
        if hook is not None:
            device = getattr(hook, "execution_device", None)
            return None if device is None else torch.device(device)
    return None


def is_brought_in(module: Any) -> bool:
    """Tell whether accelerate (1.15) or DeepSpeed's ZeRO-3 brings a module's parameters in.

    Args:
        module: A module, or a container of parameters.
    """
    return hasattr(module, "_hf_hook") or hasattr(module, "ds_id")


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return a parameter's shape, also where DeepSpeed's ZeRO-3 (as transformers 4.57 to 5.23 use it) left it empty.

    Args:
        parameter: Any parameter.
    """
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@contextlib.contextmanager
def loaded(*modules: nn.Module) -> Iterator[None]:
    """Have the parameters of modules in place and whole, for reading (accelerate 1.15).

    Args:
        *modules: Modules whose parameters accelerate may have offloaded or ZeRO-3 partitioned; others are left alone.

    Yields:
        Nothing. Under ZeRO-3 what was read is gone afterwards: copy it, or compute inside.
    """
    with contextlib.ExitStack() as stack:
        partitioned = [p for module in modules for p in module.parameters() if hasattr(p, "ds_id")]
        if partitioned:
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(partitioned))
        hooked = [part for module in modules for part in module.modules() if hasattr(part, "_hf_hook")]
        if hooked:
            from accelerate.utils import align_module_device

            for part in hooked:
                stack.enter_context(align_module_device(part))
        yield
