"""Where factors started, kept beside them: a start from the base weight is subtracted from the update.

    ΔW = s·(B·M·A - B0·M0·A0)

The start is saved with the adapter and never trained; ``starts.py`` tells how factors begin.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moslora.compat.offloading import execution_device, whole_shape
from moslora.compat.torch import must_be_called
from moslora.core import functional
from moslora.tuner.held_mixer import apply_matrix
from moslora.tuner.reading import is_present, read_matrix

__all__ = ["HELD", "Start", "forget", "has_start", "keep", "start_by_calls", "with_start"]

# What a layer holds A0, M0 and B0 in.
HELD = ("moslora_start_A", "moslora_start_M", "moslora_start_B")


class Start(nn.Module):
    """The value that a factor started with, never trained.

    Args:
        values: The factor at the start.
    """

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        # A parameter, not a buffer: whatever casts the factors must cast this alike, or the difference is wrong.
        self.weight = nn.Parameter(values, requires_grad=False)

    def forward(self, h: Tensor) -> Tensor:
        """Multiply ``h`` by the factor, along its last dimension."""
        return apply_matrix(h, self.weight)


def has_start(layer: nn.Module, adapter_name: str) -> bool:
    """Tell whether an adapter's start is subtracted from it in a layer.

    Args:
        layer: A MoSLoRA layer.
        adapter_name: The adapter's name.
    """
    modules: dict[str, Any] = layer._modules
    return HELD[0] in modules and adapter_name in modules[HELD[0]]


def _starts(layer: nn.Module, adapter_name: str) -> list[Any]:
    modules: dict[str, Any] = layer._modules
    return [modules[name][adapter_name] for name in HELD]


def with_start(
    layer: nn.Module, adapter_name: str, A: Tensor, M: Tensor, B: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return factors whose product is ``B·M·A - B0·M0·A0``.

    Args:
        layer: A MoSLoRA layer.
        adapter_name: The adapter's name.
        A, M, B: Its trained factors, shapes ``(r, in)``, ``(r, r)``, ``(out, r)``.

    Returns:
        Shapes ``(2r, in)``, ``(2r, 2r)``, ``(out, 2r)``; the factors themselves if there is no start to subtract.
    """
    if not has_start(layer, adapter_name):
        return A, M, B
    dtype = torch.promote_types(A.dtype, M.dtype)
    A0, M0, B0 = (_read(start).to(dtype) for start in _starts(layer, adapter_name))
    return functional.subtract_start((A.to(dtype), M.to(dtype), B.to(dtype)), (A0, M0, B0))


def _read(start: Any) -> Tensor:
    """Return a factor's start, by a call where it is not there without one."""
    weight: Tensor = start.weight
    if is_present(weight) or not must_be_called(start):
        return weight
    like = torch.empty((), dtype=weight.dtype, device=execution_device(start))
    return read_matrix(start, whole_shape(weight)[-1], like)


def start_by_calls(layer: nn.Module, x: Tensor, adapter_name: str) -> Tensor:
    """Return ``B0·M0·A0·x`` by calling the modules that hold the start.

    Args:
        layer: A MoSLoRA layer.
        x: Its input, shape ``(..., in)``.
        adapter_name: An adapter with a start.

    Returns:
        Shape ``(..., out)``, not scaled.
    """
    for start in _starts(layer, adapter_name):
        x = start(x)
    return x


def keep(layer: Any, adapter_name: str, A: Tensor, M: Tensor, B: Tensor) -> None:
    """Keep copies of an adapter's factors as its start.

    Args:
        layer: A MoSLoRA layer.
        adapter_name: The adapter's name.
        A, M, B: Its factors, as they are held.
    """
    for name, factor in zip(HELD, (A, M, B), strict=True):
        if name not in layer._modules:
            layer.add_module(name, nn.ModuleDict())
            layer.adapter_layer_names = (*layer.adapter_layer_names, name)
        holder: Any = layer._modules[name]
        holder[adapter_name] = Start(factor.detach().clone())


def forget(layer: nn.Module, adapter_name: str) -> None:
    """Forget the start of an adapter, if there is one.

    Args:
        layer: A MoSLoRA layer.
        adapter_name: The adapter's name.
    """
    if has_start(layer, adapter_name):
        modules: dict[str, Any] = layer._modules
        for name in HELD:
            del modules[name][adapter_name]
