"""A trained bias on B (``lora_bias=True``), as PEFT's LoRA has it.

    h = W0·x + b0 + s·(B·M·A·x + b)        b: (out,), starts at zero

It is ``moslora_B.NAME.bias``, a parameter of the module that holds B. Merging adds ``s·b`` to the base's bias, so a
base layer without one cannot be merged into. A and M have none: a bias before B is one after it, ``B·M·a``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from moslora.compat.offloading import loaded
from moslora.compat.torch import must_be_called, unwrapped_by_fsdp
from moslora.core.finite import all_finite
from moslora.errors import UsageError
from moslora.terminal import warn
from moslora.tuner.config import MoSLoRAConfig
from moslora.tuner.factor_holder import FactorHolder
from moslora.tuner.reading import whole
from moslora.tuner.refused import refuse_in_layer

__all__ = ["add_to_base", "bias_of", "check", "check_mergeable", "has_bias"]


def check(layer: FactorHolder, config: MoSLoRAConfig) -> None:
    """Refuse a bias on B where a layer cannot have one.

    Args:
        layer: A MoSLoRA layer.
        config: Its adapter's configuration.

    Raises:
        ValueError: With the reason and the way out.

    Warns:
        UserWarning: If the base layer has no bias, so that the adapter cannot be merged.
    """
    if not config.lora_bias:
        return
    base, reason = layer.get_base_layer(), layer.why_no_bias()
    if reason is not None:
        refuse_in_layer(base, "lora_bias=True", reason, "set lora_bias=False")
    if getattr(base, "bias", None) is None:
        warn(
            f"lora_bias=True adapts a {type(base).__name__} that has no bias of its own, so the adapter can be run, "
            "saved and exported, but not merged.",
            stacklevel=2,
        )


def _holder(layer: FactorHolder, adapter_name: str) -> tuple[Any, Any]:
    """Return the module that holds B, and the one inside it that has the bias."""
    entry = getattr(layer, layer.adapter_layer_names[2])[adapter_name]
    return entry, unwrapped_by_fsdp(entry)


def has_bias(layer: FactorHolder, adapter_name: str) -> bool:
    """Tell whether an adapter has a bias on B in a layer.

    Args:
        layer: A MoSLoRA layer.
        adapter_name: An adapter of it.
    """
    if adapter_name in layer.tied:
        return False
    _, inner = _holder(layer, adapter_name)
    return getattr(inner, "bias", None) is not None


def bias_of(layer: FactorHolder, adapter_name: str) -> Tensor | None:
    """Return an adapter's bias on B, by a call where it is not there without one.

    Args:
        layer: A MoSLoRA layer.
        adapter_name: An adapter of it.

    Returns:
        Shape ``(out,)``, not scaled; None if it has none.
    """
    if adapter_name in layer.tied:
        return None
    entry, inner = _holder(layer, adapter_name)
    bias = cast("Tensor | None", getattr(inner, "bias", None))
    if bias is None:
        return None
    is_there = not bias.is_meta and bias.ndim == 1 and bias.numel() == layer.out_features
    if not must_be_called(entry) or (is_there and entry is inner):
        return bias
    if isinstance(inner, nn.Linear):
        zero = torch.zeros(1, inner.in_features, dtype=bias.dtype, device=layer.run_device())
        with torch.autocast(zero.device.type, enabled=False):
            return cast(Tensor, entry(zero))[0]
    with loaded(entry):
        return cast(Tensor, inner.bias).clone()


def check_mergeable(layers: Iterable[FactorHolder], adapter_names: Iterable[str]) -> None:
    """Refuse to merge a bias on B into a base that has no bias.

    Args:
        layers: MoSLoRA layers.
        adapter_names: The adapters to be merged; a layer may have any of them.

    Raises:
        ValueError: If there is such a layer.
    """
    names = set(adapter_names)
    for layer in layers:
        base = layer.get_base_layer()
        if getattr(base, "bias", None) is None and any(
            has_bias(layer, name) for name in names & set(layer.scaling)
        ):
            raise UsageError(
                f"Cannot merge: the adapter has a bias on B (lora_bias=True), and a {type(base).__name__} of the base "
                "has no bias to add it to; nothing was changed. Give the base's layers a bias of zeros first, or leave "
                "the adapter beside the base, or export it as a plain LoRA."
            )


def add_to_base(layer: FactorHolder, adapter_name: str, sign: int, safe: bool) -> Tensor | None:
    """Return the base's bias with ``s·b`` added or taken away, to be put in its place.

    Args:
        layer: A MoSLoRA layer.
        adapter_name: An adapter of it.
        sign: 1 to add, -1 to take away.
        safe: Refuse NaN or infinite values.

    Returns:
        Shape ``(out,)``, in the dtype of the base's bias; None if the adapter has no bias.

    Raises:
        ValueError: If ``safe`` found NaN or infinite values.
    """
    bias = bias_of(layer, adapter_name)
    if bias is None:
        return None
    own = whole(layer.get_base_layer(), "bias")
    # Summed in the wider of the two dtypes and rounded once.
    merged: Tensor = (own + sign * layer.scaling[adapter_name] * bias.to(own.device)).to(own.dtype)
    if safe and not all_finite(merged):
        raise UsageError(
            f"Merging adapter {adapter_name!r} would put NaN or infinite values into the bias; nothing was changed. "
            "Load an earlier checkpoint of the adapter."
        )
    return merged
