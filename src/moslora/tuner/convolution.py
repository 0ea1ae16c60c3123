"""Adapted convolutions: A is a convolution to r channels, M and B are 1×1 convolutions."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from moslora.adapters.convolutions import CONVOLUTIONS, join_groups
from moslora.compat.torch import convolve
from moslora.core import functional
from moslora.core.fused_update import chains
from moslora.errors import UsageError
from moslora.tuner.config import MoSLoRAConfig
from moslora.tuner.factor_holder import without_values
from moslora.tuner.held_mixer import apply_matrix
from moslora.tuner.layer import MoSLoRALayer
from moslora.tuner.reading import check_present

__all__ = ["MoSLoRAConv"]


class MoSLoRAConv(MoSLoRALayer):
    """A convolution with ``ΔW = s·B·M·A`` beside its weight.

    A has the shape ``(r, in, *kernel)`` and the base's stride, padding, padding mode and dilation; M is
    ``(r, r, 1…)``, B ``(out, r / groups, 1…)``. In a grouped convolution A and M see all input channels and
    B's groups write the base's groups, as in PEFT's LoRA: such an update has no place in the base weight, so
    it can be folded and exported, but not merged.
    """

    quantized_kind = "conv2d"

    def _check_adapter(self, r: int, config: MoSLoRAConfig) -> None:
        groups = self.get_base_layer().groups
        if r % groups:
            raise UsageError(
                f"r={r} cannot be split over the {groups} groups of a {type(self.get_base_layer()).__name__}. "
                f"Choose a multiple of {groups} (for this module alone: rank_pattern), or leave the module out."
            )

    def make_factors(self, adapter_name: str, r: int, has_bias: bool) -> None:
        """Put A, M and B in their places."""
        base = self.get_base_layer()
        kind = CONVOLUTIONS[base.weight.ndim - 2]
        A = kind(
            self.in_features,
            r,
            base.kernel_size,
            stride=base.stride,
            padding=base.padding,
            dilation=base.dilation,
            padding_mode=base.padding_mode,
            bias=False,
        )
        B = kind(r, self.out_features, 1, groups=base.groups, bias=has_bias)
        self._hold(adapter_name, A, without_values(kind, r, r, 1, like=A), B)

    def why_unlike_lora(self) -> str | None:
        """Return why stock PEFT's LoRA would compute another output with these weights; None if it would not."""
        base = self.get_base_layer()
        if any(k > 1 and d > 1 for k, d in zip(base.kernel_size, base.dilation, strict=True)):
            return f"its dilation is {base.dilation}, which PEFT's LoRA leaves out"
        padding = base.padding if isinstance(base.padding, str) else max(base.padding)
        if base.padding_mode != "zeros" and padding not in ("valid", 0):
            return f"its padding mode is {base.padding_mode!r}, for which PEFT's LoRA pads with zeros"
        return None

    def as_matrices(
        self, adapter_name: str, A: Tensor, M: Tensor, B: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return A ``(r, in · kernel)``, M ``(r, r)``, B ``(out, r)``; between groups B is filled with zeros."""
        A, M, B = (factor.flatten(1) for factor in (A, M, B))
        return A, M, join_groups(B, self.get_base_layer().groups)

    def lay(self, delta: Tensor) -> Tensor:
        """Return ΔW in the shape of the base weight."""
        base = self.get_base_layer()
        if base.groups != 1:
            raise UsageError(
                f"Cannot merge into a convolution of {base.groups} groups: the update mixes channels across "
                "groups, for which the base weight has no place. Leave the adapter beside the base, or export "
                "it as a plain LoRA."
            )
        return delta.view(base.weight.shape)  # (out, in, *kernel)

    @property
    def weight_dims(self) -> int:  # type: ignore[override]
        """How many dimensions the base weight has."""
        return cast(int, self.get_base_layer().weight.ndim)

    def why_no_magnitude(self) -> str | None:
        """Return None: this layer can have DoRA's magnitude."""
        return None

    def why_no_bias(self) -> str | None:
        """Return None: B can have a bias in this layer."""
        return None

    def delta_in_norm(self, adapter: str) -> Tensor:
        """Build what DoRA's norm takes to be added to the base weight; between groups as PEFT's LoRA lays it.

        Args:
            adapter: The adapter's name.

        Returns:
            The shape of the base weight, ``(out, in / groups, *kernel)``; float32 at least.
        """
        base = self.get_base_layer()
        if base.groups == 1:
            return super().delta_in_norm(adapter)
        A, M, B = self.held_factors(adapter)
        dtype = torch.promote_types(A.dtype, torch.float32)
        A, M = A.flatten(1).to(dtype), M.flatten(1).to(dtype)
        B = B.reshape(-1, len(A)).to(dtype)  # (out / groups, r), rows of several outputs in one
        return functional.delta_weight(A, M, B, self.scaling[adapter]).view(base.weight.shape)

    def base_product(self, x: Tensor) -> Tensor:
        """Return the base layer's output without its bias."""
        base = self.get_base_layer()
        return convolve(base, x, self.get_base_weight().to(x.dtype), None)

    def _update(self, x: Tensor, name: str) -> Tensor:
        return self.low_rank(self.moslora_dropout[name](x), name)

    def low_rank(self, x: Tensor, name: str) -> Tensor:
        """Return ``s·(B·M·A·x + b)``, dropping nothing, shape ``(n, out, *positions)``; b where B has a bias."""
        if self.factors_must_be_called(name):
            return self.update_by_calls(x, name)
        A, M, B = self.held_factors(name)
        check_present(x, A, M, B)
        of_A = self.moslora_A[name]
        scaled = M * self.scaling[name]
        positions = x.numel() // self.in_features // math.prod(self.get_base_layer().stride)
        if chains(positions, A[0].numel()):
            H = convolve(of_A, x, A.to(x.dtype), None)  # (n, r, *positions)
            H = apply_matrix(H, scaled.to(H.dtype))
        else:
            # Composed first, in the dtype of the mixer: M then costs nothing per position.
            composed = (scaled.flatten(1) @ A.flatten(1).to(scaled.dtype)).view_as(A)  # (r, in, *kernel)
            H = convolve(of_A, x, composed.to(x.dtype), None)  # (n, r, *positions)
        own = self.bias_on_B(name)
        own = own if own is None else (own * self.scaling[name]).to(H.dtype)
        return convolve(self.moslora_B[name], H, B.to(H.dtype), own)  # (n, out, *positions)
