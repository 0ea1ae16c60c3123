"""Tied adapters: a head that shares its weight with the embedding has the embedding's factors, transposed.

PEFT asks for that by ``ensure_weight_tying``. The factors are held in one of the two layers, the source. A file has
them under both names, as PEFT's LoRA writes them.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from moslora.errors import UsageError
from moslora.tuner.config import MoSLoRAConfig
from moslora.tuner.factor_holder import FactorHolder

__all__ = ["shares_weight_with_source", "take_out", "tie", "tied_tensors"]


@torch.no_grad()
def tie(layer: FactorHolder, adapter_name: str, source: FactorHolder, config: MoSLoRAConfig) -> None:
    """Take another layer's factors for an adapter's, for good: the two share ΔW as they share the weight.

    As in PEFT's LoRA, tied factors start with the values that the head's would have: small, as A is elsewhere, and not
    as large as those of an embedding.

    Args:
        layer: A MoSLoRA layer.
        adapter_name: The adapter's name, in both layers.
        source: The layer that holds the factors.
        config: The adapter's configuration.

    Raises:
        UsageError: If the two layers' weights are not of one shape.
    """
    if layer.is_transpose_of(source):
        sizes = source.out_features, source.in_features
    else:
        sizes = source.in_features, source.out_features
    if sizes != (layer.in_features, layer.out_features):
        raise UsageError(
            f"A layer of {layer.in_features} inputs and {layer.out_features} outputs cannot be tied to one of "
            f"{source.in_features} and {source.out_features}. Set ensure_weight_tying=False."
        )
    A, _, B = layer.held_factors(adapter_name)
    if config.init_lora_weights and not A.is_meta and layer.is_transpose_of(source):
        held_A, M, held_B = source.held_factors(adapter_name)
        held_A.copy_(B.T)
        held_B.copy_(A.reshape(held_B.shape))  # drawn into its memory, row after row
        if config.match_scale:
            source.set_mixer(adapter_name, M * (held_B.norm() / (held_B.to(M.dtype) @ M).norm()))
    for name in layer.adapter_layer_names:
        if adapter_name in getattr(layer, name):
            del getattr(layer, name)[adapter_name]
    layer.mixer_start.pop(adapter_name)
    layer.unfilled.pop(adapter_name, None)
    layer.frozen_peft_weight_names.pop(adapter_name, None)
    for own, others in (
        (layer.r, source.r),
        (layer.lora_alpha, source.lora_alpha),
        (layer.scaling, source.scaling),
        (layer.unscaled, source.unscaled),
    ):
        cast(dict[str, Any], own)[adapter_name] = cast(dict[str, Any], others)[adapter_name]
    layer.tied[adapter_name] = (source,)


def shares_weight_with_source(layer: FactorHolder, adapter_name: str) -> bool:
    """Tell whether merging an adapter in its source changes this layer's weight, too, because they share it.

    Args:
        layer: A MoSLoRA layer.
        adapter_name: The adapter's name.
    """
    if adapter_name not in layer.tied:
        return False
    source = layer.tied[adapter_name][0].get_base_layer()
    return getattr(layer.get_base_layer(), "weight", None) is getattr(source, "weight", None)


def tied_tensors(model: nn.Module, adapter_name: str) -> list[tuple[str, str, bool]]:
    """Return the tensors that a file has of tied layers: the name, that of the tensor it is, and whether transposed."""
    paths = {id(module): path for path, module in model.named_modules()}
    found = []
    for path, layer in model.named_modules():
        if not isinstance(layer, FactorHolder) or adapter_name not in layer.tied:
            continue
        source = layer.tied[adapter_name][0]
        transposed = layer.is_transpose_of(source)
        of_source = source.adapter_layer_names[:3]
        for own, others in zip(
            layer.adapter_layer_names[:3], reversed(of_source) if transposed else of_source, strict=True
        ):
            suffix = "" if layer.container is nn.ParameterDict else ".weight"
            found.append(
                (
                    f"{path}.{own}.{adapter_name}{suffix}",
                    f"{paths[id(source)]}.{others}.{adapter_name}",
                    transposed,
                )
            )
    return found


def take_out(tensors: dict[str, Tensor], ties: list[Any]) -> list[str]:
    """Take tensors of tied layers out of a checkpoint, and tell which are not what they are tied to."""
    problems = []
    for name, source_name, transposed in ties:
        own, source = tensors.pop(name, None), tensors.get(source_name)
        if own is None or source is None:
            continue
        if not torch.equal(own.to(source.dtype), source.T if transposed else source):
            problems.append(
                f"{name}: is not {source_name}, to which it is tied; the adapter was saved with "
                "ensure_weight_tying=False, so load it so"
            )
    return problems
