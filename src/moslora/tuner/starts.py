"""Where factors start, beyond LoRA's own beginnings.

A saved adapter's file holds the values of a mixer that was given as a tensor or callable, its configuration does not:
such a mixer is NaN until the file's values are put in, so that nothing can run in between and be wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["check_filled", "leave_unfilled"]


def leave_unfilled(layer: Any, adapter_name: str, M: Tensor) -> None:
    """Leave a mixer to be filled from a file.

    Args:
        layer: A MoSLoRA layer.
        adapter_name: The adapter's name.
        M: Its mixer; put to NaN.
    """
    M.fill_(float("nan"))
    layer._unfilled.add(adapter_name)


def check_filled(layer: Any, adapter_name: str, M: Tensor) -> None:
    """Refuse to use a mixer into which nothing has been put yet.

    Args:
        layer: A MoSLoRA layer whose mixer was left unfilled.
        adapter_name: The adapter's name.
        M: Its mixer.

    Raises:
        ValueError: If it is still NaN.
    """
    if torch.compiler.is_compiling():
        return  # a look at values has no place in a graph; NaN would show in the output
    if torch.isnan(M.detach()).all():
        raise ValueError(
            f"The mixer of adapter {adapter_name!r} has no values: its configuration is a saved adapter's, with "
            'mixer="custom", and no file was loaded. Load the adapter with PeftModel.from_pretrained; or, to start a '
            "new one, set mixer in the configuration to a tensor, a callable or a name."
        )
    layer._unfilled.discard(adapter_name)
