"""Adapted layers: a frozen base layer, and per adapter the factors A, M and B.

One class serves ``nn.Linear``, transformers' ``Conv1D`` and every quantised linear layer that PEFT knows a
backend for.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moslora import functional, ops
from moslora.mixers import forked_generator, initial_mixer
from moslora.tuner.config import MoSLoRAConfig

__all__ = ["MoSLoRALayer", "MoSLoRALinear"]

logger = logging.getLogger(__name__)
_told: set[str] = set()


def _tell_once(reason: str) -> None:
    """Say why the fused path is not taken; once per reason, for there are hundreds of layers."""
    if not torch.compiler.is_compiling() and reason not in _told:
        _told.add(reason)
        logger.info("MoSLoRA runs base product and update apart: %s.", reason)


class MoSLoRALayer(BaseTunerLayer):  # type: ignore[misc]
    """What every adapted layer has: factors by adapter name, scales, and merging.

    The factors are bias-free ``nn.Linear`` modules, as LoRA's are, so that what finds ``lora_A.NAME.weight``
    by its form (hot-swapping, sharding policies) finds ``moslora_A.NAME.weight`` too.
    """

    adapter_layer_names = ("moslora_A", "moslora_M", "moslora_B")
    other_param_names = ("r", "lora_alpha", "scaling", "moslora_dropout")

    # What PEFT's mixin brings, told to the type checker.
    get_base_layer: Callable[[], nn.Module]
    get_base_weight: Callable[[], Tensor]
    set_base_weight: Callable[[Tensor], None]
    active_adapters: list[str]

    def _init_adapters(self, base_layer: nn.Module, **kwargs: Any) -> None:
        """Hold no adapter yet.

        Args:
            base_layer: The layer to adapt, or another MoSLoRA layer's base.
            **kwargs: ``get_apply_tensor_subclass`` for torchao bases, as PEFT hands it over.

        Raises:
            TypeError: If the sizes of the layer cannot be told.
        """
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.moslora_A = nn.ModuleDict()
        self.moslora_M = nn.ModuleDict()
        self.moslora_B = nn.ModuleDict()
        self.moslora_dropout = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self._unscaled: dict[str, float] = {}
        # A class attribute in PEFT; an own dict keeps one layer's frozen mixer from freezing another's.
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: float, config: MoSLoRAConfig, **kwargs: Any
    ) -> None:
        """Add an adapter, or start it anew.

        Args:
            adapter_name: Its name.
            r: Rank in this layer.
            lora_alpha: Alpha in this layer.
            config: Everything that does not differ between layers.
            **kwargs: Ignored; PEFT hands over more than is needed.
        """
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = functional.scaling(lora_alpha, r, config.use_rslora)
        self._unscaled[adapter_name] = self.scaling[adapter_name]
        self.moslora_dropout[adapter_name] = (
            nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        )
        self.moslora_A[adapter_name] = nn.Linear(self.in_features, r, bias=False)
        self.moslora_B[adapter_name] = nn.Linear(r, self.out_features, bias=False)
        self._start_factors(adapter_name, config)
        if config.train_mixer:
            self.frozen_peft_weight_names.pop(adapter_name, None)
        else:
            self.frozen_peft_weight_names[adapter_name] = ("moslora_M",)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def _start_factors(self, adapter_name: str, config: MoSLoRAConfig) -> None:
        """Give the factors their initial values.

        A and B draw what LoRA's draw, in the same order, from torch's default generator; M draws from a
        fork of it. With one seed, LoRA and MoSLoRA therefore start with the same A in every layer.
        """
        r = self.r[adapter_name]
        # An nn.Linear would draw from the generator, so it is made without values, where A is (maybe on
        # the meta device).
        device = cast(Tensor, self.moslora_A[adapter_name].weight).device
        self.moslora_M[adapter_name] = nn.utils.skip_init(nn.Linear, r, r, bias=False, device=device)  # type: ignore[no-untyped-call]
        A, M, B, _ = self.factors(adapter_name)
        if A.is_meta:
            return
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(A, std=1 / r)
        elif config.init_lora_weights:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        if config.init_lora_weights:
            nn.init.zeros_(B)
        M.copy_(initial_mixer(config.mixer, r, forked_generator()))
        if config.match_scale:
            M.mul_(A.norm() / (M @ A).norm())

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor, float]:
        """Return what an adapter holds in this layer.

        Args:
            adapter_name: Its name.

        Returns:
            A ``(r, in)``, M ``(r, r)``, B ``(out, r)`` and the scale.

        Raises:
            KeyError: If the layer has no adapter of this name.
        """
        A, M, B = (
            cast(Tensor, factor[adapter_name].weight)
            for factor in (self.moslora_A, self.moslora_M, self.moslora_B)
        )
        return A, M, B, self.scaling[adapter_name]

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the scale of an adapter to ``scale`` times its own.

        Args:
            adapter: Its name; nothing happens if the layer does not have it.
            scale: Factor, unitless.
        """
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self._unscaled[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of every active adapter.

        Args:
            scale: Factor, unitless.
        """
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of every active adapter, or set it back.

        Args:
            scale: Divisor, unitless; None restores the scale of the configuration.
        """
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] = (
                    self._unscaled[adapter] if scale is None else self.scaling[adapter] / scale
                )

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter.

        Args:
            adapter_name: Its name.
        """
        super().delete_adapter(adapter_name)
        self._unscaled.pop(adapter_name, None)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Tell PEFT that ΔW is additive, so that the adapter can be converted to LoRA."""
        return True


class MoSLoRALinear(nn.Module, MoSLoRALayer):
    """A linear layer (or Conv1D, or a quantised one) with ``ΔW = s·B·M·A`` beside its weight.

    Args:
        base_layer: The frozen layer.
        adapter_name: The first adapter's name.
        config: Its configuration.
        r: Its rank in this layer.
        lora_alpha: Its alpha in this layer.
        **kwargs: What PEFT says about quantisation.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: MoSLoRAConfig,
        r: int,
        lora_alpha: float,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self._init_adapters(base_layer, **kwargs)
        # Conv1D stores its weight as (in, out). The layer knows; a flag in the configuration may be wrong.
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Build ΔW as it lies in the base layer.

        Args:
            adapter: The adapter's name.

        Returns:
            Shape ``(out, in)``, or ``(in, out)`` for Conv1D; float32 where the factors are of lower
            precision, else their dtype.
        """
        A, M, B, scale = self.factors(adapter)
        dtype = torch.promote_types(A.dtype, torch.float32)
        delta = functional.delta_weight(A.to(dtype), M.to(dtype), B.to(dtype), scale)
        return delta.T if self.fan_in_fan_out else delta

    def _add_to_weight(self, adapter: str, sign: int, safe: bool) -> None:
        weight = self.get_base_weight()
        delta = self.get_delta_weight(adapter).to(weight.device)
        # Summed in the wider of the two dtypes and rounded once.
        merged = (weight + sign * delta).to(weight.dtype)
        if safe and not torch.isfinite(merged).all():
            raise ValueError(
                f"Merging adapter {adapter!r} would put NaN or infinite values into the weight; nothing was "
                "changed. Load an earlier checkpoint of the adapter."
            )
        self.set_base_weight(merged)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW into the base weight.

        Args:
            safe_merge: Refuse to write NaN or infinite values.
            adapter_names: Which adapters; the active ones if None.

        Raises:
            ValueError: If ``safe_merge`` found NaN or infinite values.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter in self.moslora_A:
                self._add_to_weight(adapter, 1, safe_merge)
                self.merged_adapters.append(adapter)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take every merged ΔW out of the base weight again, up to rounding."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            if adapter in self.moslora_A:
                self._add_to_weight(adapter, -1, safe=False)

    def _why_apart(self, x: Tensor, name: str) -> str | None:
        """Tell why base product and update cannot run as one Function; None if they can.

        Only a plain layer qualifies: a quantised or sharded weight has no such product, hooks on the base
        layer (offloading, another adapter library) must see its call.
        """
        base = self.base_layer
        weight: Any = getattr(base, "weight", None)
        if not ops.is_fusing():
            return "fusing is switched off"
        if type(base) not in (nn.Linear, Conv1D) or type(weight) not in (nn.Parameter, Tensor):
            return f"the base layer is a {type(base).__name__} with a {type(weight).__name__}"
        if (
            base._forward_hooks
            or base._forward_pre_hooks
            or base._backward_hooks
            or "forward" in base.__dict__
        ):
            return "the base layer has hooks"
        if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            return f"the base weight is {weight.dtype}, its input {x.dtype}"
        if self.training and isinstance(self.moslora_dropout[name], nn.Dropout):
            return "dropout changes the update's input"
        return None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the base layer and the active adapters.

        Args:
            x: Input, shape ``(..., in)``.
            *args: Handed to the base layer.
            **kwargs: Handed to the base layer.

        Returns:
            Shape ``(..., out)``, dtype of the base layer's output.
        """
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return cast(Tensor, self.base_layer(x, *args, **kwargs))
        if self.merged:
            return cast(Tensor, self.base_layer(x, *args, **kwargs))
        active = [name for name in self.active_adapters if name in self.moslora_A]
        if active:
            name = active[0]
            reason = "the call has more arguments" if args or kwargs else self._why_apart(x, name)
            if reason is None:
                base: Any = self.base_layer
                weight = base.weight.T if self.fan_in_fan_out else base.weight  # (out, in)
                result = ops.adapted_linear(x, weight, base.bias, *self.factors(name))
                return self._add_updates(x, result, active[1:])
            _tell_once(reason)
        return self._add_updates(x, self.base_layer(x, *args, **kwargs), active)

    def _add_updates(self, x: Tensor, result: Tensor, adapters: list[str]) -> Tensor:
        """Add the updates of ``adapters`` to ``result``, shape ``(..., out)``."""
        for name in adapters:
            update = ops.low_rank_update(self.moslora_dropout[name](x), *self.factors(name))
            result = result + update.to(result.dtype)  # (..., out)
        return result

    def __repr__(self) -> str:
        return "moslora." + super().__repr__()
