"""PEFT's ``BaseTunerLayer`` as version 0.21 has it, for 0.18 to 0.21: what is frozen, and the base's weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

__all__ = ["Frozen", "TunerLayer"]


class Frozen:
    """Factors that stay frozen whatever is activated, for PEFT 0.18 and 0.19. Nothing is lost."""

    frozen_peft_weight_names: Mapping[str, tuple[str, ...]] = {}

    def _freeze_non_trainable_peft_weights(self, adapter_names: Any = None) -> None:
        layer: Any = self
        names = self.frozen_peft_weight_names if adapter_names is None else adapter_names
        for name in [names] if isinstance(names, str) else names:
            for dictionary in self.frozen_peft_weight_names.get(name, ()):
                held = getattr(layer, dictionary, {})
                if name in held:
                    held[name].requires_grad_(False)

    def set_adapter(self, adapter_names: Any, inference_mode: bool = False) -> None:
        """Choose the active adapters, and what of them is trained.

        Args:
            adapter_names: A name, or several.
            inference_mode: Train nothing of them.
        """
        super().set_adapter(adapter_names, inference_mode=inference_mode)  # type: ignore[misc]
        self._freeze_non_trainable_peft_weights(adapter_names)

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        """Train adapters, or stop that.

        Args:
            adapter_names: A name, or several.
            requires_grad: Whether they are trained.
        """
        super().set_requires_grad(adapter_names, requires_grad)  # type: ignore[misc]
        if requires_grad:
            self._freeze_non_trainable_peft_weights(adapter_names)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter.

        Args:
            adapter_name: Its name.
        """
        cast(dict[str, Any], self.frozen_peft_weight_names).pop(adapter_name, None)
        super().delete_adapter(adapter_name)  # type: ignore[misc]


class _BaseWeight:
    """The base's weight, for PEFT 0.18 and 0.19. Lost there: writing a quantized one, so merging into it."""

    def get_base_weight(self) -> Tensor:
        """Return the base weight, dequantized if it is quantized."""
        layer: Any = self
        base = layer.get_base_layer()
        if layer.quantization_backend is None:
            return cast(Tensor, base.weight.data)
        return cast(Tensor, layer.quantization_backend.get_base_weight(base))

    def set_base_weight(self, weight_data: Tensor) -> None:
        """Put a base weight in place."""
        layer: Any = self
        if layer.quantization_backend is not None:
            layer.quantization_backend.set_base_weight(layer, weight_data)
        else:
            layer.get_base_layer().weight.data = weight_data


_LAYER_BASES: tuple[type, ...] = (
    *(() if hasattr(BaseTunerLayer, "frozen_peft_weight_names") else (Frozen,)),
    *(() if hasattr(BaseTunerLayer, "get_base_weight") else (_BaseWeight,)),
    BaseTunerLayer,
)
TunerLayer: Any = type(
    "TunerLayer",
    _LAYER_BASES,
    {
        "__doc__": "PEFT's ``BaseTunerLayer``, with what 0.21 has and the installed one lacks.",
        "__module__": __name__,
    },
)
