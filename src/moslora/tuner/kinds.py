"""The table of kinds: which adapted layer serves which base layer.

A new kind is one entry of ``KINDS``, and a file of its own for the layer.
"""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from moslora.compat.peft import quantization
from moslora.tuner.attention import MoSLoRAAttention
from moslora.tuner.convolution import MoSLoRAConv
from moslora.tuner.embedding import MoSLoRAEmbedding
from moslora.tuner.layer import MoSLoRALayer
from moslora.tuner.linear import MoSLoRALinear

__all__ = ["KINDS", "find_layer_class"]

KINDS: dict[type[nn.Module], type[MoSLoRALayer]] = {
    nn.Linear: MoSLoRALinear,
    Conv1D: MoSLoRALinear,
    nn.Embedding: MoSLoRAEmbedding,
    nn.Conv1d: MoSLoRAConv,
    nn.Conv2d: MoSLoRAConv,
    nn.Conv3d: MoSLoRAConv,
    nn.MultiheadAttention: MoSLoRAAttention,
}
# What a quantized layer is called by the backend that knows it, where its class says nothing.
QUANTIZED_KINDS: dict[str, type[MoSLoRALayer]] = {
    layer_class.quantized_kind: layer_class for layer_class in KINDS.values() if layer_class.quantized_kind
}


def find_layer_class(base_layer: nn.Module) -> type[MoSLoRALayer] | None:
    """Choose the adapted layer for a base layer.

    Args:
        base_layer: A module of the base model.

    Returns:
        Its kind's class; None if there is none.
    """
    for base_class, layer_class in KINDS.items():
        if isinstance(base_layer, base_class):
            return layer_class
    backend = quantization.resolve_quantization_backend(base_layer)
    return None if backend is None else QUANTIZED_KINDS.get(backend.layer_type)
