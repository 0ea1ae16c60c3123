"""In which dtype the update is computed, and keeping autocast from changing it."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

__all__ = ["compute_dtype", "in_dtype", "is_autocasting", "without_autocast"]


def is_autocasting(device: str) -> bool:
    """Tell whether autocast is on for a type of device. Autocast does not know every type (not meta).

    Args:
        device: The type.
    """
    return device != "meta" and torch.is_autocast_enabled(device)


def without_autocast(device: str) -> contextlib.AbstractContextManager[object]:
    """Keep autocast from changing dtypes that are chosen in a block; free where it is off.

    Args:
        device: The type of device.
    """
    return torch.autocast(device, enabled=False) if is_autocasting(device) else contextlib.nullcontext()


def in_dtype(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    """Return ``tensor`` in a dtype. Asking first is quicker than ``to``, which a step would call thousands of times.

    Args:
        dtype: The dtype.
        tensor: Any tensor.
    """
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a layer computes on ``x``: that of ``x``, or autocast's.

    Args:
        x: The layer's input.
    """
    device = x.device.type
    return torch.get_autocast_dtype(device) if is_autocasting(device) else x.dtype
