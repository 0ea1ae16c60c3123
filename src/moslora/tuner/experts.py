"""Adapted parameters: expert weights held as one 3-D tensor, or any matrix that is not the weight of a module.

The module that holds the parameter reads it in its own forward (often in a grouped kernel), so the update
cannot run beside it: for the length of a call the parameter is replaced by W + ΔW.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moslora.compat.offloading import whole_shape
from moslora.errors import UsageError
from moslora.tuner.config import MoSLoRAConfig
from moslora.tuner.factor_holder import without_values
from moslora.tuner.layer import MoSLoRALayer
from moslora.tuner.reading import check_present, replaced, whole

__all__ = ["ParamWrapper"]


def _bits(tensor: Tensor) -> int:
    """Return how many bits an entry has; 0 if it is not a floating-point number."""
    return torch.finfo(tensor.dtype).bits if tensor.is_floating_point() else 0


class ParamWrapper(MoSLoRALayer):
    """A module one of whose parameters carries ``ΔW = s·B·M·A``, with a mixer for each expert.

    PEFT finds these layers by this class name, and nests one for each parameter of a module. The factors
    have the layout of PEFT's LoRA, with E experts: A ``(E·r, in)``, expert after expert; B ``(out, r·E)``,
    rank after rank; and M ``(E·r, r)``, expert after expert, so that each expert's M folds into its rows of
    A. A parameter is ``(E, out, in)``, or ``(E, in, out)`` where its module says ``is_transposed`` (gpt-oss),
    or a matrix ``(out, in)``.

    Args:
        base_layer: The module that holds the parameter, or the layer around another of its parameters.
        adapter_name: The first adapter's name.
        config: Its configuration.
        r: Its rank in this layer.
        lora_alpha: Its alpha in this layer.
        parameter_name: The parameter's name in the module.
        **kwargs: What PEFT says about quantization.

    Raises:
        ValueError: If the parameter is quantized or has another number of dimensions, or dropout is asked for.
    """

    is_rowwise = False  # W + ΔW is built once for the whole batch

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: MoSLoRAConfig,
        r: int,
        lora_alpha: float,
        *,
        parameter_name: str,
        **kwargs: Any,
    ) -> None:
        self._parameter_name = parameter_name
        super().__init__(base_layer, adapter_name, config, r, lora_alpha, **kwargs)

    @property
    def parameter_name(self) -> str:
        """The name of the adapted parameter in its module."""
        return self._parameter_name

    @property
    def _parameter(self) -> Tensor:
        parameter = getattr(self.get_base_layer(), self.parameter_name)
        assert isinstance(parameter, Tensor)
        return parameter

    @property
    def _shape(self) -> tuple[int, ...]:
        """The whole parameter's shape, also where ZeRO-3 has partitioned it."""
        parameter = self._parameter
        return whole_shape(parameter)

    @property
    def _dims(self) -> int:
        return len(self._shape)

    @property
    def _is_in_out(self) -> bool:
        """Whether the weight of an expert lies as ``(in, out)``."""
        return self._dims == 3 and getattr(self.get_base_layer(), "is_transposed", False)

    def _sizes(self) -> tuple[int, int]:
        base, parameter = self.get_base_layer(), self._parameter
        name = f"{type(base).__name__}.{self.parameter_name}"
        if self._dims not in (2, 3):
            raise UsageError(
                f"{name} has the shape {self._shape}; a parameter that can be adapted is a matrix or "
                "a stack of matrices. Name the module in target_modules, or leave the parameter out."
            )
        parametrizations = getattr(base, "parametrizations", {})
        is_computed = self.parameter_name in parametrizations
        originals = list(parametrizations[self.parameter_name].parameters()) if is_computed else [parameter]
        if any(_bits(original) < 16 for original in originals):
            found = ", ".join(sorted({str(original.dtype) for original in originals}))
            raise UsageError(
                f"{name} is quantized ({found}), and what its values mean is known to its module "
                "alone. Load the base with these weights in 16 or 32 bits, or leave the parameter out."
            )
        if is_computed:
            by = ", ".join(type(part).__name__ for part in parametrizations[self.parameter_name])
            raise UsageError(
                f"{name} is not stored but computed, by a parametrization ({by}), so an update cannot be added to it. "
                "Call torch.nn.utils.parametrize.remove_parametrizations(module, "
                f"{self.parameter_name!r}) first, or leave the parameter out."
            )
        *_, rows, columns = self._shape
        return (rows, columns) if self._is_in_out else (columns, rows)

    def _check_adapter(self, r: int, config: MoSLoRAConfig) -> None:
        if config.lora_dropout:
            raise UsageError(
                f"lora_dropout={config.lora_dropout} has no place in {self.parameter_name}: the update of a "
                "parameter is added to it, so there is no input to drop from. Set lora_dropout=0 with "
                "target_parameters."
            )

    def make_factors(self, adapter_name: str, r: int, has_bias: bool) -> None:
        """Put A, M and B in their places."""
        rows = r * (self._shape[0] if self._dims == 3 else 1)  # E·r
        A = nn.Linear(self.in_features, rows, bias=False)
        B = nn.Linear(rows, self.out_features, bias=False)
        self._hold(adapter_name, A, without_values(nn.Linear, r, rows, like=A), B)

    def as_matrices(
        self, adapter_name: str, A: Tensor, M: Tensor, B: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return A ``(E, r, in)``, M ``(E, r, r)`` and B ``(E, out, r)``; of a matrix without the E."""
        if self._dims == 3:
            r = self.r[adapter_name]
            A, M = A.view(-1, r, A.shape[1]), M.view(-1, r, r)
            B = B.view(len(B), r, -1).permute(2, 0, 1)
        return A, M, B

    def why_no_bias(self) -> str | None:
        """Return why B cannot have a bias in this layer."""
        return f"the update is added to the parameter {self.parameter_name}, and a bias has none to go to"

    def lay(self, delta: Tensor) -> Tensor:
        """Return ΔW in the shape of the base weight."""
        return delta.mT if self._is_in_out else delta

    def get_base_weight(self) -> Tensor:
        """Return the parameter."""
        return whole(self.get_base_layer(), self.parameter_name)

    def set_base_weight(self, weight_data: Tensor) -> None:
        """Put values into the parameter."""
        self._parameter.data = weight_data

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move an adapter to the device and dtype of the parameter, for its module has none of its own."""
        target = self._parameter
        place = device or target.device
        if place.type == "meta":
            return
        for name in self.adapter_layer_names[:3]:
            factor = getattr(self, name)[adapter_name]
            if not any(p.is_meta for p in factor.parameters()):
                factor.to(place, target.dtype)

    def weight_beside(self) -> Tensor:
        """Return the base parameter in whose group a sharded model has the start of a mixer."""
        return self._parameter

    def _adapted_parameter(self, adapters: list[str]) -> Tensor:
        """Return W + ΣΔW, in W's dtype: summed inside one product for each adapter, so ΔW is never built."""
        weight = self.get_base_weight()
        with torch.autocast(weight.device.type, enabled=False):
            for name in adapters:
                A, M, B, scale = self.factors(name)
                check_present(weight, A, M, B)
                left, right = B.to(weight.dtype), (M @ A.to(M.dtype)).to(weight.dtype)
                if self._is_in_out:
                    left, right = right.mT, left.mT
                add = torch.baddbmm if weight.ndim == 3 else torch.addmm
                weight = add(weight, left, right, alpha=scale)
        return weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module with W + ΔW in the parameter's place.

        Args:
            *args: Handed to the module.
            **kwargs: Handed to the module.

        Returns:
            What the module returns.
        """
        active = [] if self.is_base_alone() else self.active_here()
        if not active:
            return self.base_layer(*args, **kwargs)
        adapted = self._adapted_parameter(active)
        with replaced({(self.get_base_layer(), self.parameter_name): adapted}):
            return self.base_layer(*args, **kwargs)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the module without the layers around it; PEFT calls this for what is nested.

        Args:
            merge: Add ΔW into the parameters first.
            safe_merge: Refuse to write NaN or infinite values.
            adapter_names: Which adapters; the active ones if None.

        Raises:
            ValueError: If ``safe_merge`` found NaN or infinite values.
        """
        module: nn.Module = self
        while isinstance(module, ParamWrapper):
            if merge:
                module.merge(safe_merge, adapter_names)
            module = module.base_layer
        return module
