"""Parameters that are not simply there: offloaded, partitioned, sharded, or behind a module that must be called.

A parameter that accelerate offloads is on the meta device outside its module's forward; one that DeepSpeed's ZeRO-3
partitions is empty there; one that FSDP's first version wraps is a part of a flat tensor, and its gradient is averaged
only if the module was called. A layer that reads ``A.weight`` without calling ``A`` misses all three, and torch's
product on the CPU reads arbitrary memory for a meta tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from moslora.compat.offloading import loaded

__all__ = ["check_present", "is_present", "read_matrix", "replaced", "whole"]


def is_present(tensor: Tensor) -> bool:
    """Tell whether a factor or weight has its values, in its own shape."""
    return not tensor.is_meta and tensor.numel() > 0 and tensor.ndim > 1


def check_present(x: Tensor, *tensors: Tensor) -> None:
    """Refuse to compute with tensors that have no values.

    Args:
        x: The input of the computation; on the meta device nothing has values, which is fine.
        *tensors: Factors or weights.

    Raises:
        RuntimeError: If one is empty, or on the meta device while x is not.
    """
    for tensor in tensors:
        if tensor.numel() == 0 or (tensor.is_meta and not x.is_meta):
            raise RuntimeError(
                f"A factor or weight of shape {tuple(tensor.shape)} on {tensor.device} has no values here: it is "
                "offloaded, partitioned or not loaded yet, and nothing brings it in for this layer. Load the adapter's "
                "weights (PeftModel.from_pretrained, load_adapter), or let accelerate, DeepSpeed or FSDP prepare the "
                "model after the adapter is on it."
            )


def whole(module: nn.Module, name: str) -> Tensor:
    """Return a parameter, brought in if it is offloaded or partitioned.

    Args:
        module: What holds it.
        name: Its name there.

    Returns:
        The parameter itself; a copy if it had to be brought in.

    Raises:
        RuntimeError: If it has no values even so.
    """
    parameter = cast(Tensor, getattr(module, name))
    if not (parameter.is_meta or parameter.numel() == 0):
        return parameter
    with loaded(module):
        parameter = cast(Tensor, getattr(module, name))
        if parameter.is_meta or parameter.numel() == 0:
            raise RuntimeError(
                f"{type(module).__name__}.{name} has no values here ({tuple(parameter.shape)} on {parameter.device}), "
                "and its adapter needs them. Load the base before the adapter is run, merged or started from it."
            )
        return parameter.clone()


def read_matrix(module: Any, inputs: int, like: Tensor) -> Tensor:
    """Read a factor through its module: what it makes of the identity.

    Args:
        module: A linear layer, or a mixer, perhaps wrapped or hooked.
        inputs: How many inputs it has.
        like: A tensor of the device and dtype to use.

    Returns:
        Its matrix, shape ``(outputs, inputs)``, with its gradient.
    """
    # A row of zeros more, for of zeros a bias is made.
    rows = torch.eye(inputs + 1, inputs, device=like.device, dtype=like.dtype)
    with torch.autocast(like.device.type, enabled=False):
        made = cast(Tensor, module(rows))
        return (made[:-1] - made[-1]).T


@contextlib.contextmanager
def replaced(tensors: dict[tuple[nn.Module, str], Tensor]) -> Iterator[None]:
    """Put tensors in the place of parameters, whatever hooks do to the parameters meanwhile.

    An instance's own attribute is found before its parameters are looked for. ``torch.func.functional_call`` changes
    the parameters, which FSDP's views and accelerate's loading pass by.

    Args:
        tensors: By module and parameter name.

    Yields:
        Nothing.
    """
    before = [(module, name, module.__dict__.get(name)) for module, name in tensors]
    try:
        for (module, name), tensor in tensors.items():
            module.__dict__[name] = tensor
        yield
    finally:
        for module, name, kept in before:
            if kept is None:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = kept
