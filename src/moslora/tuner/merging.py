"""Merging: adding ΔW into the base weight of a layer, and taking it out again."""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge

from moslora.compat.peft.quantization import ReadOnlyBackend
from moslora.core.finite import all_finite
from moslora.errors import UsageError
from moslora.terminal import warn
from moslora.tuner import bias, dora, tying
from moslora.tuner.factor_holder import FactorHolder, unknown_quantization
from moslora.tuner.sharding import check_mergeable_when_sharded

__all__ = ["check_layer", "merge", "unmerge"]


def check_layer(layer: FactorHolder) -> None:
    """Refuse a base layer that cannot be merged into.

    Args:
        layer: A MoSLoRA layer.

    Raises:
        RuntimeError: If the base's weight is sharded between processes.
        ValueError: If the base's quantization cannot be written.
    """
    check_mergeable_when_sharded(layer.get_base_layer())
    backend = layer.quantization_backend
    if isinstance(backend, ReadOnlyBackend):
        raise UsageError(backend.why_not_merged(layer.get_base_layer()))
    if backend is not None and not (backend.supports_merge and backend.layer_type == layer.quantized_kind):
        raise UsageError(
            f"Cannot merge into a {type(layer.get_base_layer()).__name__}: PEFT's {backend.backend_name} "
            "backend cannot quantize its weight anew. Leave the adapter beside the base, export it as a "
            "plain LoRA, or load the base in 16 or 32 bits and merge there."
        )
    if getattr(backend, "get_apply_tensor_subclass", None) is unknown_quantization:
        raise UsageError(
            "Cannot merge: how the base was quantized by torchao is not known. Load it through transformers "
            "with quantization_config=TorchAoConfig(...), or leave the adapter beside the base."
        )


def _add_to_weight(layer: FactorHolder, adapter: str, sign: int, safe: bool) -> None:
    """Add an adapter's ΔW to the base weight, or take it away."""
    if tying.shares_weight_with_source(layer, adapter):
        return  # done in the layer whose weight it is, too
    weight = layer.get_base_weight()
    delta = dora.whole_delta(layer, adapter).to(weight.device)
    # Summed in the wider of the two dtypes and rounded once.
    merged = (weight + sign * delta).to(weight.dtype)
    if safe and not all_finite(merged):
        raise UsageError(
            f"Merging adapter {adapter!r} would put NaN or infinite values into the weight; nothing was "
            "changed. Load an earlier checkpoint of the adapter."
        )
    merged_bias = bias.add_to_base(layer, adapter, sign, safe)
    layer.set_base_weight(merged)
    if merged_bias is not None:
        layer.get_base_layer().bias.data = merged_bias


@torch.no_grad()
def merge(layer: FactorHolder, safe_merge: bool, adapter_names: list[str] | None) -> None:
    """Add ΔW into the base weight.

    Args:
        layer: A MoSLoRA layer.
        safe_merge: Refuse to write NaN or infinite values.
        adapter_names: Which adapters; the active ones if None.

    Raises:
        UsageError: If ``safe_merge`` found NaN or infinite values, or the layer cannot be merged.
    """
    for adapter in check_adapters_to_merge(layer, adapter_names):
        if adapter in layer.scaling:
            check_layer(layer)
            bias.check_mergeable([layer], [adapter])
            gain = dora.gain(layer, adapter)  # before merging: the merged weight does not tell it
            _add_to_weight(layer, adapter, 1, safe_merge)
            layer.merged_gains.update({} if gain is None else {adapter: gain})
            layer.merged_adapters.append(adapter)


@torch.no_grad()
def unmerge(layer: FactorHolder) -> None:
    """Take every merged ΔW out of the base weight again, up to rounding.

    Args:
        layer: A MoSLoRA layer.
    """
    if not layer.merged:
        warn("Already unmerged. Nothing to do.", stacklevel=2)
    while layer.merged_adapters:
        adapter = layer.merged_adapters[-1]
        if adapter in layer.scaling:
            _add_to_weight(layer, adapter, -1, safe=False)
        layer.merged_adapters.pop()
        layer.merged_gains.pop(adapter, None)
