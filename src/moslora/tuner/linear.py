"""Adapted linear layers: ``nn.Linear``, transformers' ``Conv1D``, and quantized ones that PEFT has a backend for."""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moslora.compat.torch import is_managed_by_fsdp, must_be_called, plain_weight
from moslora.core import ops
from moslora.core.autocast import compute_dtype
from moslora.core.notices import tell_once
from moslora.tuner import bias, dora, kept_start
from moslora.tuner.factor_holder import without_values
from moslora.tuner.held_mixer import is_narrow
from moslora.tuner.layer import MoSLoRALayer
from moslora.tuner.names import FACTORS

__all__ = ["MoSLoRALinear"]

logger = logging.getLogger(__name__)

NOT_FUSED = "Fused path disabled: base layer and update run separately: %s."


class MoSLoRALinear(MoSLoRALayer):
    """A linear layer (or Conv1D, or a quantized one) with ``ΔW = s·B·M·A`` beside its weight."""

    quantized_kind = "linear"
    takes_starts = True

    @property
    def fan_in_fan_out(self) -> bool:  # type: ignore[override]
        """Whether the weight lies as ``(in, out)``. The layer knows; a flag in the configuration may be wrong."""
        return isinstance(self.get_base_layer(), Conv1D)

    def make_factors(self, adapter_name: str, r: int, has_bias: bool) -> None:
        """Put A, M and B in their places."""
        A = nn.Linear(self.in_features, r, bias=False)
        B = nn.Linear(r, self.out_features, bias=has_bias)
        self._hold(adapter_name, A, without_values(nn.Linear, r, r, like=A), B)

    def lay(self, delta: Tensor) -> Tensor:
        """Return ΔW in the shape of the base weight."""
        return delta.T if self.fan_in_fan_out else delta

    def why_no_magnitude(self) -> str | None:
        """Return None: this layer can have DoRA's magnitude."""
        return None

    def why_no_bias(self) -> str | None:
        """Return None: B can have a bias in this layer."""
        return None

    def low_rank(self, x: Tensor, name: str) -> Tensor:
        """Return ``s·B·M·A·x``, dropping nothing; of an adapter with a magnitude, so there is no bias on B."""
        if self.factors_must_be_called(name):
            return self.update_by_calls(x, name)
        return ops.low_rank_update(x, *self.present_factors(x, name))  # (..., out)

    def base_product(self, x: Tensor) -> Tensor:
        """Return the base layer's output without its bias."""
        weight = self.get_base_weight().to(x.dtype)
        return nn.functional.linear(x, weight.T if self.fan_in_fan_out else weight)  # (..., out)

    def _why_not_fused(self, x: Tensor, base: Any, active: list[str], dropout: float) -> str | None:
        """Return why base product and update cannot run as one Function; None if they can.

        Only a plain layer qualifies: a quantized or sharded weight has no such product, hooks on the base
        layer (offloading, another adapter library) must see its call.
        """
        weight: Any = getattr(base, "weight", None)
        if not ops.is_fusing():
            return "fusing is switched off"
        if any(dora.has_magnitude(self, name) for name in active):
            return "DoRA's magnitude rescales the base layer's own output"
        if type(base) not in (nn.Linear, Conv1D) or type(weight) not in (nn.Parameter, Tensor):
            return f"the base layer is a {type(base).__name__} with a {type(weight).__name__}"
        if must_be_called(base):
            return "the base layer has hooks"
        if self.factors_must_be_called(active[0]):
            return "the factors are wrapped or have hooks, so they must be called"
        if weight.dtype != x.dtype and not ops.is_autocasting(x.device.type):
            return f"the base weight is {weight.dtype}, its input {x.dtype}"
        return ops.why_no_fused_dropout(x, dropout) if dropout else None

    def _dropout(self, name: str) -> float:
        """Return the probability with which entries of the update's input are dropped now."""
        dropout = self.moslora_dropout[name]
        return float(cast(Any, dropout).p) if self.training and isinstance(dropout, nn.Dropout) else 0.0

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """Run the base layer and the active adapters.

        Args:
            x: Input, shape ``(..., in)``.
            *args: Handed to the base layer.
            adapter_names: One per row of a mixed batch; None runs the active adapters on all rows.
            **kwargs: Handed to the base layer.

        Returns:
            Shape ``(..., out)``, dtype of the base layer's output.
        """
        if adapter_names is not None:
            return self._forward_mixed(x, adapter_names, *args, **kwargs)
        if ops.is_for_few_operations(x) and not args and not kwargs:
            result = self._by_few_operations(x)
            if result is not None:
                return result
        if self.is_base_alone():
            return cast(Tensor, self.base_layer(x, *args, **kwargs))
        active = self.active_here()
        if active:
            name, base = active[0], cast(Any, self.base_layer)
            dropout = self._dropout(name)
            reason = (
                "the call has more arguments"
                if args or kwargs
                else self._why_not_fused(x, base, active, dropout)
            )
            if reason is None:
                weight = base.weight.T if type(base) is Conv1D else base.weight  # (out, in)
                result = ops.adapted_linear(
                    x, weight, base.bias, *self.present_factors(x, name), dropout=dropout
                )
                return self._add_updates(x, self._with_bias(result, name), active[1:])
            tell_once(logger, NOT_FUSED, reason)
        return self._add_updates(x, self.base_layer(x, *args, **kwargs), active)

    def _by_few_operations(self, x: Tensor) -> Tensor | None:
        """Run a plain layer with one plain adapter; None for all others, which go the way of ``forward``.

        Nothing is remembered between calls: what decides is read each time, as little of it as there is.
        """
        active: Any = self._active_adapter
        name = active if type(active) is str else active[0] if len(active) == 1 else None
        if name is None or self._disable_adapters or self.merged_adapters or not self._is_plain(name):
            return None
        base: Any = self._modules["base_layer"]
        if type(base) is not nn.Linear or must_be_called(base):
            return None
        weight: Any = base._parameters.get("weight")
        A, M, B = (plain_weight(self, kind, name) for kind in FACTORS)
        if type(weight) not in (nn.Parameter, Tensor) or A is None or M is None or B is None:
            return None
        dtype = x.dtype
        alike = (
            dtype == weight.dtype == A.dtype == M.dtype == B.dtype and x.device == A.device == weight.device
        )
        if not alike or (is_narrow(dtype) and M.requires_grad and torch.is_grad_enabled()):
            return None
        return ops.by_few_operations(x, weight, base._parameters.get("bias"), A, M, B, self.scaling[name])

    def _is_plain(self, name: str) -> bool:
        """Tell whether an adapter is three factors here and nothing more, without dropout at the moment."""
        if name in self.unfilled:
            self.held_factors(name)  # refuses it, or sees that it has been filled
        return (
            name in self.scaling
            and name not in self.tied
            and name not in self.mixer_start._modules
            and not (self.training and type(self.moslora_dropout._modules[name]) is not nn.Identity)
            and not dora.has_magnitude(self, name)
            and not kept_start.has_start(self, name)
            and not is_managed_by_fsdp(self)
        )

    def _update(self, x: Tensor, name: str) -> Tensor:
        if self.factors_must_be_called(name):
            return self.update_by_calls(self.moslora_dropout[name](x), name)
        return self._with_bias(self._updated(x, name, None), name)

    def _updated(self, x: Tensor, name: str, beside: Tensor | None) -> Tensor:
        """Return an adapter's update without its bias, added to ``beside`` if that is given."""
        dropout = self._dropout(name)
        if dropout and (not ops.is_fusing() or ops.why_no_fused_dropout(x, dropout) is not None):
            x, dropout = self.moslora_dropout[name](x), 0.0
        factors = self.present_factors(x, name)
        return ops.adapted_linear(x, None, None, *factors, dropout=dropout, beside=beside)  # (..., out)

    def _add_updates(self, x: Tensor, result: Tensor, adapters: list[str]) -> Tensor:
        """Add the updates of ``adapters`` to the base layer's output, if it may be by the product that makes them."""
        base_out = result
        for name in adapters:
            if self._may_stand_beside(x, result, name):
                result = self._with_bias(self._updated(x, name, result), name)
            else:
                result = result + self._update_beside(x, name, base_out).to(result.dtype)
        return result

    def _may_stand_beside(self, x: Tensor, result: Tensor, name: str) -> bool:
        """Tell whether the base layer's output is such that an update can be added by the product that makes it."""
        return (
            ops.is_fusing()
            and not dora.has_magnitude(self, name)
            and not self.factors_must_be_called(name)
            and type(result) is Tensor
            and result.dtype == compute_dtype(x)
            and result.shape == (*x.shape[:-1], self.out_features)
        )

    def _with_bias(self, out: Tensor, name: str) -> Tensor:
        """Add an adapter's bias on B, scaled, if it has one."""
        own = bias.bias_of(self, name)
        return out if own is None else out + (own * self.scaling[name]).to(out.dtype)
