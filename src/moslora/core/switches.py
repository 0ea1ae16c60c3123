"""Two switches of the fast paths: one Function for base product and update, and Triton kernels for both."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from moslora.errors import UsageError

__all__ = ["fusing", "is_fusing", "is_using_kernels", "read_switch", "using_kernels"]


def read_switch(value: str | None) -> bool:
    """Read the environment variable ``MOSLORA_KERNELS``.

    Args:
        value: Its value; None if it is not set.

    Returns:
        Whether it asks for the kernels.

    Raises:
        UsageError: If it is neither 0 nor 1.
    """
    if value not in (None, "", "0", "1"):
        raise UsageError(f"MOSLORA_KERNELS={value!r} must be 0 or 1; set it to 1 or 0.")
    return value == "1"


_fusing = True
# Read as an attribute by ``ops.py``, which asks in every forward.
kernels_are_on = read_switch(os.environ.get("MOSLORA_KERNELS"))


def is_fusing() -> bool:
    """Tell whether layers may run base product and update as one Function."""
    return _fusing


@contextlib.contextmanager
def fusing(enabled: bool) -> Iterator[None]:
    """Switch the fused path of adapted layers on or off, to compare it with the slow one.

    Args:
        enabled: Whether layers may take the fused path inside the block.

    Yields:
        Nothing.
    """
    global _fusing
    previous, _fusing = _fusing, enabled
    try:
        yield
    finally:
        _fusing = previous


def is_using_kernels() -> bool:
    """Tell whether Triton kernels may be used: ``MOSLORA_KERNELS=1``, or ``using_kernels``."""
    return kernels_are_on


@contextlib.contextmanager
def using_kernels(enabled: bool) -> Iterator[None]:
    """Switch the Triton kernels on or off, whatever ``MOSLORA_KERNELS`` says.

    Args:
        enabled: Whether the update may run in kernels inside the block, where they take its input.

    Yields:
        Nothing.
    """
    global kernels_are_on
    previous, kernels_are_on = kernels_are_on, enabled
    try:
        yield
    finally:
        kernels_are_on = previous
