"""DoRA's magnitude (arXiv:2402.09353) on top of a mixer: the update turns the rows of W0, m says how long they are.

    W' = m · (W0 + s·B·M·A) / ‖W0 + s·B·M·A‖      row by row, one m for each output;  m starts as ‖W0 + s·B·M·A‖

With the gain ``g = m / ‖W0 + s·B·M·A‖`` a layer adds ``(g - 1)·W0·x + g·s·B·M·A·x`` to its base's output. As in PEFT's
LoRA, whose conventions these are, the norm is a constant to the gradient (section 4.3 of the paper), the base's bias
is left alone, and in training dropout acts on the input of both terms. M folds into A as ever, m is carried over as it
is, and what comes out is a DoRA adapter of plain LoRA.

An embedding's rows are tokens, so its m is one for each column of the weight. In a grouped convolution the update mixes
channels across groups and has no place in the weight. PEFT's LoRA takes a norm all the same, of W0 plus the numbers of
B·A laid into its shape. What is trained here must be what the exported adapter runs, so the norm here is that one too.
It is a constant to the gradient and m starts as it, so a fresh adapter changes nothing.

Where several adapters are active, each adds its own ``W' - W0``, whatever the order. (PEFT's LoRA rescales what those
before have made of the output, so there the order counts.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moslora.compat.torch import must_be_called
from moslora.errors import UsageError
from moslora.tuner.config import MoSLoRAConfig
from moslora.tuner.factor_holder import FactorHolder
from moslora.tuner.names import MAGNITUDE
from moslora.tuner.refused import refuse_in_layer

__all__ = [
    "Magnitude",
    "begin",
    "cast_like_factors",
    "check",
    "delta_weight",
    "gain",
    "has_magnitude",
    "unmerged_weight",
    "update",
    "whole_delta",
]

# A merged weight is the sum of several; if their gains cancel, no base weight can be had from it again.
SMALLEST_GAIN = 1e-3


class Magnitude(nn.Module):
    """What an adapter's m is held in.

    Args:
        values: m, of the shape in which PEFT's LoRA holds it: ``(out,)``, of a convolution ``(1, out, 1, …)``.
    """

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values)

    def forward(self, like: Tensor) -> Tensor:
        """Return m times ``like``, a tensor of ones; for it may have to be called to be there."""
        return like * self.weight


def check(layer: FactorHolder, config: MoSLoRAConfig) -> None:
    """Refuse a magnitude where it has no meaning.

    Args:
        layer: A MoSLoRA layer.
        config: Its adapter's configuration.

    Raises:
        ValueError: With the reason and the way out.
    """
    if not config.use_dora:
        return
    reason = layer.why_no_magnitude()
    if reason is not None:
        refuse_in_layer(layer.get_base_layer(), "use_dora=True", reason, "set use_dora=False")


def _magnitudes(layer: FactorHolder) -> Any:
    """Return what holds a layer's magnitudes."""
    return layer._modules[MAGNITUDE]


def has_magnitude(layer: FactorHolder, adapter_name: str) -> bool:
    """Tell whether an adapter has a magnitude in a layer.

    Args:
        layer: A MoSLoRA layer.
        adapter_name: The adapter's name.
    """
    return MAGNITUDE in layer._modules and adapter_name in _magnitudes(layer)


@torch.no_grad()
def begin(layer: FactorHolder, adapter_name: str, config: MoSLoRAConfig) -> None:
    """Give an adapter its magnitude, so that W' starts as W0 + ΔW; or take one away that a former one had.

    Args:
        layer: A MoSLoRA layer whose factors have their values.
        adapter_name: The adapter's name.
        config: Its configuration.

    Raises:
        ValueError: If an output of the base has no weights but zeros, and so no direction.
    """
    if has_magnitude(layer, adapter_name):
        del _magnitudes(layer)[adapter_name]
    if not config.use_dora:
        return
    if MAGNITUDE not in layer._modules:
        layer.add_module(MAGNITUDE, nn.ModuleDict())
        layer.adapter_layer_names = (*layer.adapter_layer_names, MAGNITUDE)
    spare = (1,) * (layer.weight_dims - 2)  # of a convolution
    shape = (1, layer.out_features, *spare) if spare else (layer.out_features,)
    A = layer.parameter_of(layer.adapter_layer_names[0], adapter_name)
    if A.is_meta:
        values = torch.empty(shape, device="meta")
    elif adapter_name in layer.unfilled:  # comes from the file that fills the rest
        dtype = torch.promote_types(A.dtype, torch.float32)
        values = torch.full(shape, float("nan"), dtype=dtype, device=A.device)
    else:
        values = _norm(layer, adapter_name).view(shape)
        if not values.all():
            raise UsageError(
                f"use_dora=True divides by the norm of each output's weights, and {int((values == 0).sum())} outputs "
                f"of a {type(layer.get_base_layer()).__name__} have none but zeros. Leave the module out, or set "
                "use_dora=False."
            )
    _magnitudes(layer)[adapter_name] = Magnitude(values)


def cast_like_factors(layer: FactorHolder, adapter_name: str) -> torch.dtype | None:
    """Hold an adapter's magnitude in the dtype of its factors.

    Args:
        layer: A MoSLoRA layer.
        adapter_name: The adapter's name.

    Returns:
        That dtype; None if the adapter has no magnitude there.
    """
    if not has_magnitude(layer, adapter_name):
        return None
    magnitude, A = (
        _magnitudes(layer)[adapter_name],
        layer.parameter_of(layer.adapter_layer_names[0], adapter_name),
    )
    magnitude.weight.data = magnitude.weight.data.to(A.dtype)
    dtype: torch.dtype = A.dtype
    return dtype


def _along(values: Tensor, ndim: int, dim: int) -> Tensor:
    """Lay one value for each output along a dimension."""
    shape = [1] * ndim
    shape[dim] = -1
    return values.reshape(shape)


def _out_dim(layer: FactorHolder) -> int:
    """Return which dimension of the base weight the outputs are."""
    return 1 if layer.fan_in_fan_out else 0


def _directed(layer: FactorHolder, adapter_name: str) -> Tensor:
    """Return ``W0 + s·B·M·A`` as the base weight lies, in float32 at least."""
    delta: Tensor = layer.delta_in_norm(adapter_name)
    return unmerged_weight(layer).to(delta.device) + delta


def _norm(layer: FactorHolder, adapter_name: str, directed: Tensor | None = None) -> Tensor:
    """Return ``‖W0 + s·B·M·A‖`` for each output, shape ``(out,)``; a constant to the gradient."""
    with torch.no_grad():
        directed = _directed(layer, adapter_name) if directed is None else directed
        dims = [dim for dim in range(directed.ndim) if dim != _out_dim(layer)]
        norm: Tensor = torch.linalg.vector_norm(directed, dim=dims)
        return norm


def unmerged_weight(layer: FactorHolder) -> Tensor:
    """Return the base weight as it is without what is merged into it, up to rounding.

    Args:
        layer: A MoSLoRA layer.

    Returns:
        The shape of the base weight; float32 at least.

    Raises:
        ValueError: If the merged adapters' gains cancel, so that it cannot be had.
    """
    weight: Tensor = layer.get_base_weight()
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    merged = [name for name in layer.merged_adapters if name in layer.scaling]
    if not merged:
        return weight
    # W = W0 + Σ (g·(W0 + Δ) - W0) = W0·(1 + Σ (g - 1)) + Σ g·Δ, with g = 1 where there is no magnitude
    total = torch.ones((), dtype=weight.dtype, device=weight.device)
    for name in merged:
        delta = layer.low_rank_delta(name).to(weight.device)
        kept = layer.merged_gains.get(name)
        if kept is not None:
            g = _along(kept.to(weight), weight.ndim, _out_dim(layer))
            total = total + (g - 1)
            delta = g * delta
        weight = weight - delta
    if bool((total.abs() < SMALLEST_GAIN).any()):
        raise UsageError(
            f"The adapters {merged} were merged together, and their magnitudes cancel, so the base weight cannot be "
            "reconstructed. Load the base again, and merge one adapter at a time."
        )
    return weight / total


@torch.no_grad()
def delta_weight(layer: FactorHolder, adapter_name: str) -> Tensor:
    """Build ``W' - W0`` as it lies in the base layer.

    Args:
        layer: A MoSLoRA layer.
        adapter_name: An adapter with a magnitude.

    Returns:
        The shape of the base weight; float32 at least.
    """
    base = unmerged_weight(layer)
    directed = base + layer.low_rank_delta(adapter_name).to(base.device)
    kept = layer.merged_gains.get(adapter_name)
    g = _gain(layer, adapter_name, directed) if kept is None else kept
    change: Tensor = _along(g.to(directed), directed.ndim, _out_dim(layer)) * directed - base
    return change


def _gain(layer: FactorHolder, adapter_name: str, directed: Tensor | None = None) -> Tensor:
    held = _magnitudes(layer)[adapter_name]
    magnitude: Tensor = held.weight
    if must_be_called(held):
        A = layer.parameter_of(layer.adapter_layer_names[0], adapter_name)
        shape = (1, layer.out_features, *(1,) * (layer.weight_dims - 2))[0 if layer.weight_dims > 2 else 1 :]
        ones = torch.ones(shape, dtype=magnitude.dtype, device=layer.run_device() if A.is_meta else A.device)
        magnitude = held(ones)
    return magnitude.reshape(-1) / _norm(layer, adapter_name, directed).to(magnitude.device)  # (out,)


@torch.no_grad()
def gain(layer: FactorHolder, adapter_name: str) -> Tensor | None:
    """Return ``g = m / ‖W0 + s·B·M·A‖`` of an adapter.

    Args:
        layer: A MoSLoRA layer.
        adapter_name: The adapter's name.

    Returns:
        Shape ``(out,)``; None if the adapter has no magnitude there.
    """
    return _gain(layer, adapter_name) if has_magnitude(layer, adapter_name) else None


def update(layer: FactorHolder, x: Tensor, adapter_name: str, base_out: Tensor) -> Tensor:
    """Return what an adapter with a magnitude adds to the base layer's output.

    Args:
        layer: A MoSLoRA layer, nothing merged.
        x: The base layer's input.
        adapter_name: The adapter's name.
        base_out: The base layer's output for x, its bias included.

    Returns:
        ``(g - 1)·W0·x + g·s·B·M·A·x``, shape of ``base_out``, float32 at least.
    """
    dropout = layer.moslora_dropout[adapter_name]
    out_dim = (
        1 - layer.weight_dims
    )  # counted from the end, for a batch may be missing or have several dimensions
    if layer.training and isinstance(dropout, nn.Dropout) and layer.has_droppable_input:
        x = dropout(x)
        base_out = layer.base_product(x)
    else:
        bias = getattr(layer.get_base_layer(), "bias", None)
        base_out = base_out if bias is None else base_out - _along(bias, base_out.ndim, out_dim)
    g = _along(_gain(layer, adapter_name), base_out.ndim, out_dim)
    low_rank: Tensor = layer.low_rank(x, adapter_name)
    return (g - 1) * base_out + g * low_rank


def whole_delta(layer: FactorHolder, adapter_name: str) -> Tensor:
    """Build ΔW of an adapter, with a magnitude or without.

    Args:
        layer: A MoSLoRA layer.
        adapter_name: The adapter's name.

    Returns:
        ``W' - W0`` of an adapter with a magnitude, else ``s·B·M·A``, in the shape of the base weight.

    Raises:
        ValueError: If this layer has no such weight; the message says why.
    """
    if has_magnitude(layer, adapter_name):
        return delta_weight(layer, adapter_name)
    return layer.low_rank_delta(adapter_name)
