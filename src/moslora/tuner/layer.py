"""MoSLoRALayer: what every adapted layer does with its adapters.

``FactorHolder`` has what a layer holds; here are adding an adapter, running, merging, scaling and deleting it. Each
kind of base layer has a file of its own (``linear.py``, ``convolution.py``, …), and ``kinds.py`` chooses between them.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from moslora.compat.torch import is_managed_by_fsdp
from moslora.core import functional
from moslora.errors import UsageError
from moslora.terminal import warn
from moslora.tuner import bias, dora, kept_start, merging, starts, tying
from moslora.tuner.config import MoSLoRAConfig
from moslora.tuner.factor_holder import FactorHolder
from moslora.tuner.held_mixer import is_narrow
from moslora.tuner.reading import check_present

__all__ = ["MoSLoRALayer"]


class MoSLoRALayer(FactorHolder):
    """What every adapted layer has: factors by adapter name, scales, and merging.

    A kind of layer adds how its factors are held (see ``FactorHolder``), its update (``_update``), and ``forward``
    where that differs.

    Args:
        base_layer: The frozen layer.
        adapter_name: The first adapter's name.
        config: Its configuration.
        r: Its rank in this layer.
        lora_alpha: Its alpha in this layer.
        **kwargs: What PEFT says about quantization.

    Raises:
        UsageError: If the layer's settings leave ΔW without a meaning; the message names the way out.
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
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config)

    # --- An adapter's values ---

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        lora_alpha: float,
        config: MoSLoRAConfig,
        *,
        components: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """Add an adapter, or start it anew.

        Args:
            adapter_name: Its name.
            r: Rank in this layer.
            lora_alpha: Alpha in this layer.
            config: Everything that does not differ between layers.
            components: Where A starts, shape ``(r, in)``, if that is not drawn; B is zero then.
            **kwargs: Ignored; PEFT hands over more than is needed.
        """
        dora.check(self, config)
        starts.check(self, config)
        bias.check(self, config)
        self._check_adapter(r, config)
        self.unfilled.pop(adapter_name, None)
        kept_start.forget(self, adapter_name)
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = functional.scaling(lora_alpha, r, config.use_rslora)
        self.unscaled[adapter_name] = self.scaling[adapter_name]
        self.moslora_dropout[adapter_name] = (
            nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        )
        self.make_factors(adapter_name, r, config.lora_bias)
        starts.start_factors(self, adapter_name, config, self._start_like_lora, components)
        if config.train_mixer:
            self.frozen_peft_weight_names.pop(adapter_name, None)
        else:
            self.frozen_peft_weight_names[adapter_name] = (self.adapter_layer_names[1],)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        starts.begin(self, adapter_name, config)
        dora.begin(self, adapter_name, config)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _check_adapter(self, r: int, config: MoSLoRAConfig) -> None:
        """Refuse an adapter that has no meaning in this layer.

        Raises:
            ValueError: With the reason and the way out.
        """

    def _start_like_lora(self, adapter_name: str, config: MoSLoRAConfig) -> None:
        """Give A and B the values that LoRA's start with."""
        A, _, B = self.held_factors(adapter_name)
        if config.init_lora_weights == "orthogonal":
            starts.draw_orthogonal(A, B)
            return
        if config.init_lora_weights == "olora":
            if not config.is_saved:
                starts.take_qr(self, A, B, config)
            return
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(A, std=1 / self.r[adapter_name])
        elif config.init_lora_weights and config.init_lora_weights != "eva":
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        if config.init_lora_weights:
            nn.init.zeros_(B)

    def tie(self, adapter_name: str, source: MoSLoRALayer, config: MoSLoRAConfig) -> None:
        """Take another layer's factors for an adapter's, for good: the two share ΔW as they share the weight.

        Args:
            adapter_name: Its name, in both layers.
            source: The layer that holds the factors.
            config: Its configuration.

        Raises:
            UsageError: If the two layers' weights are not of one shape.
        """
        tying.tie(self, adapter_name, source, config)

    def bias_on_B(self, adapter_name: str) -> Tensor | None:  # noqa: N802
        """Return an adapter's bias on B.

        Args:
            adapter_name: Its name.

        Returns:
            Shape ``(out,)``, to be scaled as B is; None if it has none.
        """
        return bias.bias_of(self, adapter_name)

    @torch.no_grad()
    def set_factors(
        self, adapter_name: str, A: Tensor, M: Tensor, B: Tensor, bias_on_B: Tensor | None = None
    ) -> None:
        """Put values into an adapter's factors, in the dtype they come in.

        Args:
            adapter_name: Its name.
            A: Shape ``(r, in)``, as ``factors`` returns it.
            M: Shape ``(r, r)``.
            B: Shape ``(out, r)``.
            bias_on_B: Shape ``(out,)``, for an adapter that has one.

        Raises:
            ValueError: If they are another layer's, to which the adapter is tied.
        """
        if adapter_name in self.tied:
            raise UsageError(
                f"The factors of adapter {adapter_name!r} are tied to another layer's here. Put values into those."
            )
        self.unfilled.pop(adapter_name, None)
        held_A, _, held_B = self.held_factors(adapter_name)
        for parameter, value in ((held_A, A), (held_B, B)):
            parameter.data = value.detach().contiguous().clone().view(parameter.shape).to(parameter.device)
        own_bias = self.bias_on_B(adapter_name)
        if own_bias is not None and bias_on_B is not None:
            own_bias.data = bias_on_B.detach().clone().to(own_bias.device)
        self.set_mixer(adapter_name, M)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Build ΔW in the shape of the base weight.

        Args:
            adapter: The adapter's name.

        Returns:
            The shape of the base weight; float32 where the factors are of lower precision, else their dtype. Of an
            adapter with DoRA's magnitude, the whole change of the weight, ``W' - W0``.

        Raises:
            ValueError: If this layer has no such weight; the message says why.
        """
        return dora.whole_delta(self, adapter)

    def train(self, mode: bool = True) -> Any:
        """Set the mode. Trainers call it before they shard or copy what is trained."""
        if mode:
            self._split_mixers()
            self._warn_of_sharded_mixers()
        return super().train(mode)

    def _warn_of_sharded_mixers(self) -> None:
        """Warn if mixers were sharded in 16 bits before they could be split, so that most of their steps are lost."""
        if not is_managed_by_fsdp(self):
            return
        for name in self.scaling:
            weight = self.trained_mixer(name)
            if weight.requires_grad and is_narrow(weight.dtype) and self.mixer_start.get(name) is None:
                warn(
                    f"The mixer of adapter {name!r} was sharded in {weight.dtype}, where most steps of training round "
                    "to nothing. Call model.train() after casting and before sharding, or keep it in float32.",
                    stacklevel=3,
                )

    # --- Merging ---

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW into the base weight.

        Args:
            safe_merge: Refuse to write NaN or infinite values.
            adapter_names: Which adapters; the active ones if None.

        Raises:
            ValueError: If ``safe_merge`` found NaN or infinite values, or the layer cannot be merged.
        """
        merging.merge(self, safe_merge, adapter_names)

    def unmerge(self) -> None:
        """Take every merged ΔW out of the base weight again, up to rounding."""
        merging.unmerge(self)

    # --- Running ---

    def is_base_alone(self) -> bool:
        """Tell whether the base layer's output is the answer: adapters are disabled, or merged into it."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        return bool(self.disable_adapters or self.merged)

    def active_here(self) -> list[str]:
        """Return the active adapters that this layer has."""
        return [name for name in self.active_adapters if name in self.scaling]

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """Run the base layer and the active adapters.

        Args:
            x: The base layer's input.
            *args: Handed to the base layer.
            adapter_names: One per row of a mixed batch; None runs the active adapters on all rows.
            **kwargs: Handed to the base layer.

        Returns:
            Shape and dtype of the base layer's output.
        """
        if adapter_names is not None:
            return self._forward_mixed(x, adapter_names, *args, **kwargs)
        active = [] if self.is_base_alone() else self.active_here()
        return self._add_updates(x, self.base_layer(x, *args, **kwargs), active)

    def _update(self, x: Tensor, name: str) -> Tensor:
        """Return what adapter ``name`` adds to the base layer's output for the input ``x``."""
        raise NotImplementedError

    def _forward_mixed(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """Run the base layer, and for each row of the batch the adapter that is named for it.

        Args:
            x: The base layer's input, the batch first.
            adapter_names: One name per row; ``"__base__"``, or an adapter that this layer does not have,
                leaves the row as the base makes it.
            *args: Handed to the base layer.
            **kwargs: Handed to the base layer.

        Returns:
            Shape and dtype of the base layer's output.

        Raises:
            ValueError: If adapters are merged, or the first dimension of ``x`` is not the batch.
        """
        if self.disable_adapters:
            self.is_base_alone()  # takes merged adapters out
            return cast(Tensor, self.base_layer(x, *args, **kwargs))
        if self.merged:
            raise UsageError(
                "adapter_names was given while adapters are merged, so no row could be without them. Call "
                "unmerge_adapter() first."
            )
        if len(x) != len(adapter_names):
            raise UsageError(
                f"{len(adapter_names)} adapter_names for an input of shape {tuple(x.shape)} in a "
                f"{type(self.get_base_layer()).__name__}: one name per row is needed. (A layer that sees tokens "
                "instead of rows, as an expert does, cannot serve mixed batches: split the batch.)"
            )
        result = base_out = cast(Tensor, self.base_layer(x, *args, **kwargs))
        for name in dict.fromkeys(adapter_names):
            if name in self.scaling:
                rows = torch.tensor([i for i, other in enumerate(adapter_names) if other == name])
                rows = rows.to(x.device)
                update = self._update_beside(x[rows], name, base_out[rows])
                result = result.index_add(0, rows, update.to(result.dtype))
        return result

    def _update_beside(self, x: Tensor, name: str, base_out: Tensor) -> Tensor:
        """Return what adapter ``name`` adds to the base layer's output for x, which is ``base_out``."""
        if dora.has_magnitude(self, name):
            return dora.update(self, x, name, base_out)
        return self._update(x, name)

    def _add_updates(self, x: Tensor, result: Tensor, adapters: list[str]) -> Tensor:
        """Add the updates of ``adapters`` to the base layer's output."""
        base_out = result
        for name in adapters:
            result = result + self._update_beside(x, name, base_out).to(result.dtype)
        return result

    def present_factors(self, x: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor, float]:
        """Return the factors to compute with on ``x``.

        Args:
            x: The base layer's input.
            name: The adapter's name.

        Raises:
            RuntimeError: If they have no values.
        """
        A, M, B, scale = self.factors(name)
        check_present(x, A, M, B)
        return A, M, B, scale

    def update_by_calls(self, x: Tensor, name: str) -> Tensor:
        """Return ``s·B·M·A·x`` without dropout by calling the modules that hold the factors.

        Args:
            x: The base layer's input.
            name: The adapter's name.
        """
        first, mix, last = (cast(Any, getattr(self, d)[name]) for d in self.adapter_layer_names[:3])
        start = self.mixer_start.get(name)
        H = first(self._cast_input_dtype(x, first.weight.dtype))
        H = mix(self._cast_input_dtype(H, mix.weight.dtype)) + (0 if start is None else start(H))
        update = last(self._cast_input_dtype(H, last.weight.dtype))
        if kept_start.has_start(self, name):
            update = update - kept_start.start_by_calls(self, x, name).to(update.dtype)
        return cast(Tensor, update * self.scaling[name])

    # --- Scales, and the end ---

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the scale of an adapter to ``scale`` times its own.

        Args:
            adapter: Its name; nothing happens if the layer does not have it.
            scale: Factor, unitless.
        """
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.unscaled[adapter]

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
                    self.unscaled[adapter] if scale is None else self.scaling[adapter] / scale
                )

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter.

        Args:
            adapter_name: Its name.
        """
        super().delete_adapter(adapter_name)
        self.unscaled.pop(adapter_name, None)
        self.unfilled.pop(adapter_name, None)
        self.component_errors.pop(adapter_name, None)
        self.mixer_start.pop(adapter_name)
        self.tied.pop(adapter_name, None)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Tell PEFT whether ΔW, of low rank, is all there is, so that the adapter can be converted to LoRA."""
        return not dora.has_magnitude(self, adapter_name) and not bias.has_bias(self, adapter_name)

    def __repr__(self) -> str:
        return f"moslora.{super().__repr__()}"
