"""Randomness that depends on the recipe's seed alone, and work that leaves the random generators as they were."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["seed_of", "undisturbed"]


def seed_of(*parts: Any) -> int:
    """Return a seed from 0 to 2⁶³ - 1, the same for the same parts.

    Args:
        *parts: What the seed is for, as ``"train", 0, 17``; only their texts count.
    """
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Use a model between two training steps without a trace.

    Inside the block the model is in evaluation mode. After it every module is in its former mode, and the random
    generators of Python, NumPy and torch (CPU and current GPU) are in their former states.

    Args:
        model: The model that is trained.
    """
    import numpy
    import torch

    modes = [(module, module.training) for module in model.modules()]
    states = random.getstate(), numpy.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            random.setstate(states[0])
            numpy.random.set_state(states[1])
