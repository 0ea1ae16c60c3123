"""Quantized bases: PEFT has backends for them since 0.20; what stands in for those with 0.18 and 0.19."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import peft.utils
import peft.utils.integrations
from torch import Tensor, nn

from moslora import versions
from moslora.errors import UsageError

__all__ = ["ReadOnlyBackend", "get_quantization_kwargs", "resolve_quantization_backend", "resolve_read_only"]

# Packages whose layers hold quantized weights, and those whose weights are quantized tensors.
_QUANTIZERS = ("bitsandbytes", "hqq", "aqlm", "eetq", "gptqmodel", "auto_gptq", "awq", "neural_compressor")
_QUANTIZED_TENSORS = ("bitsandbytes", "torchao")


class ReadOnlyBackend:
    """Stands for PEFT's backend of a quantized layer, for 0.18 and 0.19: it is run, and read where PEFT can.

    Lost there: merging into such a layer, which is refused, and unmerging.
    """

    layer_type = "linear"
    supports_merge = False

    def __init__(self, package: str) -> None:
        self.backend_name = package

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        """Return the base weight, dequantized.

        Raises:
            TypeError: If PEFT cannot.
        """
        if self.backend_name not in (*_QUANTIZED_TENSORS, "hqq"):
            raise TypeError(
                versions.need("peft", "0.20", f"Reading the weight of a {type(base_layer).__name__}")
            )
        return cast(Tensor, peft.utils.integrations.dequantize_module_weight(base_layer)).data

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
        """Refuse.

        Raises:
            UsageError: Always.
        """
        raise UsageError(self.why_not_merged(peft_layer.get_base_layer()))

    def why_not_merged(self, base_layer: nn.Module) -> str:
        """Say why nothing is merged into a layer, and what to do."""
        return versions.need(
            "peft",
            "0.20",
            f"Merging into a {type(base_layer).__name__} of {self.backend_name}",
            "Or leave the adapter beside the base, export it as a plain LoRA, or load the base in 16 or 32 bits and "
            "merge there.",
        )


def _quantizer_of(base_layer: nn.Module) -> str | None:
    """Return the package that quantized a layer; None if its weight is as it was."""
    weight = getattr(base_layer, "weight", None)
    of_layer = {kind.__module__.split(".")[0] for kind in type(base_layer).__mro__} & set(_QUANTIZERS)
    of_weight = {kind.__module__.split(".")[0] for kind in type(weight).__mro__} & set(_QUANTIZED_TENSORS)
    return next(iter(of_layer | of_weight), None)


def resolve_read_only(base_layer: nn.Module, **_: Any) -> Any:
    """Tell how a layer is quantized, as PEFT's function of 0.20 does; None if it is not.

    Args:
        base_layer: The layer.
        **_: PEFT's function takes more.
    """
    package = _quantizer_of(base_layer)
    return None if package is None else ReadOnlyBackend(package)


resolve_quantization_backend: Callable[..., Any] = getattr(
    peft.utils, "resolve_quantization_backend", resolve_read_only
)
get_quantization_kwargs: Callable[..., dict[str, Any]] = getattr(
    peft.utils, "get_quantization_kwargs", lambda model: {}
)
